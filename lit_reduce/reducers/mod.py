"""p-MoD: mixture of depths. At each layer a router says which visual tokens it works on; the others pass it by."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import cosine_decay, even_shares
from lit_reduce.ops.selectors import places, share_topk
from lit_reduce.ops.similarity import normal
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class ModConfig(ReducerConfig):
    """Size of the routers, and what they do to a layer."""

    hidden_size: int = field(default=0, metadata={"help": "width of the language model; set when training"})
    depth: int = field(default=0, metadata={"help": "layers of the language model; set when training"})
    schedule: str = field(
        default="decay",
        metadata={
            "help": "decay: fewer tokens layer by layer (p-MoD); constant: as many at each; alternate: as many at "
            "every other layer, all of them between (VideoLLM-MoD)",
            "choices": ("decay", "constant", "alternate"),
        },
    )
    weight: str = field(
        default="tanh",
        metadata={
            "help": "what a router's logit x makes of a layer: tanh: 1 + alpha tanh(x); sigmoid: 2 sigmoid(x)",
            "choices": ("tanh", "sigmoid"),
        },
    )
    alpha: float = field(default=0.05, metadata={"help": "reach of the tanh weight; p-MoD has 0.2"})
    symmetric: bool = field(default=True, metadata={"help": "weigh the tokens that pass a layer by as well (p-MoD)"})
    per_frame: bool = field(default=False, metadata={"help": "choose evenly in each frame of a video (VideoLLM-MoD)"})


@register
class Mod(ScoringReducer):
    """One linear router a layer scores the layer's visual tokens ``[B, N]``; the best go through it, all come out.

    ``keep`` is the mean number of visual tokens over the layers; `cosine_decay` spreads it. Routers start at zero, so
    that a weight of 1 leaves the model's layers as they are, and see a state divided by its root mean square, because
    states grow with depth (our reading). Tokens, text and image, keep their positions, and a layer's cache holds those
    that it worked on. A router sees an image before its question, if that is the order of the prompt.

    The weight w of a token that stays scales what the whole layer adds to it, ``h + w (layer(h) - h)``, as in
    VideoLLM-MoD; in p-MoD it scales the MLP's part of it alone, which no two families put together alike. Tokens that
    pass by become ``w h``, as in p-MoD. On a frozen model the paper's 0.2 would grow or shrink a token that passes many
    layers several fold, therefore the smaller ``alpha``; and ``sigmoid`` is doubled, to start at 1 (our reading).

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
        if not 0 <= self.config.alpha < 1:
            raise UserError(f"{self.name}: alpha={self.config.alpha}: give 0 to less than 1")
        self.routers = nn.Parameter(torch.zeros(self.config.depth, self.config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.config.depth))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Tokens of every layer, ``keep * depth`` in all.

        Raises:
            UserError: another number of layers than routers, or a budget that layers without a router exceed alone.
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
        """The layer's logits ``[B, N]``."""
        if not 0 <= tokens.layer < self.config.depth:
            raise UserError(f"{self.name}: no router for layer {tokens.layer}, only for 0 to {self.config.depth - 1}")
        x = normal(tokens.features)
        return x @ self.routers[tokens.layer] + self.bias[tokens.layer]

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The best ``keep`` of the picture, or of its frames together."""
        logits = self.score(tokens)
        reach = self.config.alpha
        weight = 1 + reach * logits.tanh() if self.config.weight == "tanh" else 2 * logits.sigmoid()
        frames = tokens.grid[0] if self.config.per_frame and tokens.count % tokens.grid[0] == 0 else 1
        part = torch.arange(frames, device=logits.device).repeat_interleave(tokens.count // frames)
        counts = torch.tensor([even_shares(keep, frames)], device=logits.device)
        stays = share_topk(logits, part, counts)
        if not self.config.symmetric:
            weight = torch.where(stays, weight, 1)
        return Reduction(places(stays, keep), scores=logits, weight=weight)


def _instead(name: str, default: Any) -> Any:
    """The field of `ModConfig` with another default."""
    return field(default=default, metadata=ModConfig.__dataclass_fields__[name].metadata)


@dataclass
class VideoLLMModConfig(ModConfig):
    """`ModConfig` as VideoLLM-MoD has it."""

    schedule: str = _instead("schedule", "alternate")
    weight: str = _instead("weight", "sigmoid")
    symmetric: bool = _instead("symmetric", False)
    per_frame: bool = _instead("per_frame", True)


@register
class VideoLLMMod(Mod):
    """`Mod` with other settings: every second layer works on a constant share of each frame of a video.

    The layers between see all tokens, so ``keep`` is more than half of them: 60 % is the paper's fifth at the routed
    ones. Which layers these are, and how the weight follows from the logit, is our reading.

    Source: VideoLLM-MoD, arXiv 2408.16730.
    """

    name = "videollm_mod"
    paper = "VideoLLM-MoD, arXiv 2408.16730"
    config_class = VideoLLMModConfig
    smallest = VideoLLMModConfig()
