"""p-MoD: mixture of depths, where a router in each layer selects the visual tokens that the layer processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import cosine_decay, even_shares
from lit_reduce.ops.selectors import share_topk, true_indices
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class ModConfig(ReducerConfig):
    """Schedule and weighting of the routers."""

    hidden_size: int = option(0, "width of the language model; set when training", min=0)
    depth: int = option(0, "layers of the language model; set when training", min=0)
    schedule: str = option(
        "decay",
        "decay: fewer tokens layer by layer (p-MoD); constant: as many at each; alternate: as many at "
        "every other layer, all of them between (VideoLLM-MoD)",
        choices=("decay", "constant", "alternate"),
    )
    weight: str = option(
        "tanh",
        "what a router's logit x makes of a layer: tanh: 1 + alpha tanh(x); sigmoid: 2 sigmoid(x)",
        choices=("tanh", "sigmoid"),
    )
    alpha: float = option(0.05, "reach of the tanh weight; p-MoD has 0.2", min=0, below=1)
    symmetric: bool = option(True, "weigh the tokens that pass a layer by as well (p-MoD)")
    per_frame: bool = option(False, "choose evenly in each frame of a video (VideoLLM-MoD)")


@register
class Mod(ScoringReducer):
    """A linear router per layer scores its visual tokens ``[B, N]``; the best enter the layer, the others skip it.

    ``keep`` is the mean number of visual tokens over the layers, distributed by `cosine_decay`. Routers are initialised
    to zero, which gives a weight of 1 and leaves the layers unchanged; they read RMS-normalised states, because states
    grow with depth (our reading). All tokens keep their positions, and the cache of a layer holds those that it
    processed. If the image comes before the question in the prompt, the router cannot read the question.

    The weight w of a processed token scales the output that the whole layer adds, ``h + w (layer(h) - h)``, as in
    VideoLLM-MoD; p-MoD scales the output of the MLP alone, which model families combine in different ways. Tokens that
    skip the layer become ``w h``, as in p-MoD. On a frozen model the paper's alpha of 0.2 would scale a token that
    skips many layers several fold, therefore ``alpha`` is smaller; the ``sigmoid`` is doubled so that it starts at 1
    (our readings).

    Source: p-MoD, arXiv 2412.04449.
    """

    name = "mod"
    kind = "skip"
    site = "decoder"
    trained = True
    warmup_target = "layers"
    paper = "p-MoD, arXiv 2412.04449"
    config_class = ModConfig
    smallest = ModConfig()

    def __init__(self, config: ModConfig | None = None) -> None:
        super().__init__(config)
        self.routers = nn.Parameter(torch.zeros(self.config.depth, self.config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.config.depth))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Token count of every layer, ``keep * depth`` in all.

        Raises:
            UserError: The decoder has another depth than the routers, or the layers without a router alone exceed the
                budget.
        """
        if depth != self.config.depth:
            raise UserError(
                f"{self.name}: this one has routers for {self.config.depth} layers, the decoder has {depth}"
            )
        if self.config.schedule == "decay":
            return dict(enumerate(cosine_decay(depth, tokens, keep)))
        routed = list(range(depth))[1::2] if self.config.schedule == "alternate" else list(range(depth))
        left = keep * depth - tokens * (depth - len(routed))
        if left < len(routed):
            least = tokens - ((tokens - 1) * len(routed)) // depth
            raise UserError(f"{self.name}: keep={keep}: layers without a router see all {tokens}; give {least} or more")
        return dict(zip(routed, even_shares(left, len(routed)), strict=True))

    def score(self, tokens: VisualTokens) -> Tensor:
        """Logits of the layer's router ``[B, N]``."""
        if not 0 <= tokens.layer < self.config.depth:
            raise UserError(f"{self.name}: no router for layer {tokens.layer}, only for 0 to {self.config.depth - 1}")
        x = rms_normalize(tokens.features)
        return x @ self.routers[tokens.layer] + self.bias[tokens.layer]

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Select the best ``keep`` tokens of the image, or equally many in each frame."""
        logits = self.score(tokens)
        reach = self.config.alpha
        weight = 1 + reach * logits.tanh() if self.config.weight == "tanh" else 2 * logits.sigmoid()
        frames = tokens.grid[0] if self.config.per_frame and tokens.count % tokens.grid[0] == 0 else 1
        part = torch.arange(frames, device=logits.device).repeat_interleave(tokens.count // frames)
        counts = torch.tensor([even_shares(keep, frames)], device=logits.device)
        stays = share_topk(logits, part, counts)
        if not self.config.symmetric:
            weight = torch.where(stays, weight, 1)
        return Reduction(true_indices(stays, keep), scores=logits, weight=weight)


def _instead(name: str, default: Any) -> Any:
    """The field of `ModConfig` with another default."""
    return option(default, **ModConfig.__dataclass_fields__[name].metadata)


@dataclass
class VideoLLMModConfig(ModConfig):
    """`ModConfig` with the settings of VideoLLM-MoD."""

    schedule: str = _instead("schedule", "alternate")
    weight: str = _instead("weight", "sigmoid")
    symmetric: bool = _instead("symmetric", False)
    per_frame: bool = _instead("per_frame", True)


@register
class VideoLLMMod(Mod):
    """`Mod` in every second layer, with a constant ratio of each video frame.

    The other layers process all tokens, so ``keep`` must exceed half of them: 60 % corresponds to the paper's 20 % in
    the layers with a router. The choice of these layers and the map from logit to weight are our reading.

    Source: VideoLLM-MoD, arXiv 2408.16730.
    """

    name = "videollm_mod"
    paper = "VideoLLM-MoD, arXiv 2408.16730"
    config_class = VideoLLMModConfig
    smallest = VideoLLMModConfig()
