"""VoCo-LLaMA: learned tokens compress the image inside the language model, and the text attends only to them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import average_pool
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens

PARTS = ("q", "k", "v", "o")  # linear maps of a layer's attention that have an update


@dataclass
class VoCoConfig(ReducerConfig):
    """Number of learned tokens and rank of the updates."""

    hidden_size: int = option(0, "width of the language model; set when training", min=0)
    depth: int = option(0, "layers of the language model; set when training", min=0)
    tokens: int = option(64, "learned tokens; keep=K uses the first K of them", min=1)
    pooled: bool = option(True, "whether each begins as the mean of its part of the picture, and stands there")
    rank: int = option(32, "rank of the updates of each layer's q, k, v and o; 0 for none", min=0)
    query_size: int = option(0, "width of all queries together; 0: the hidden size", min=0)
    key_size: int = option(0, "width of all keys together; 0: the hidden size", min=0)


@register
class VoCo(Reducer):
    """Learned tokens ``[K, D]`` follow the image and attend to it in every layer; later text attends to them instead.

    Low-rank updates of q, k, v and o apply to the learned tokens alone, so that text and image use exactly the weights
    of the frozen model. The updates are initialised to zero. The paper trains the whole model and hides text before the
    image from text after it; here it stays visible. The learned tokens of the paper are the same for all images and
    have positions of their own. Here each is added to the mean of a cell of the image and takes the position of its
    centre, so that an untrained token is average pooling; without ``pooled`` they are the paper's, at the positions of
    the image's last tokens. Text keeps its positions in either case. These differences are our reading.

    The frozen model processes the prompt in full up to the end of the image, so the first token is not faster. Saved
    are cache memory, time per decoded token, and the image for every further question about it (`Attachment.digest`).

    Source: VoCo-LLaMA, arXiv 2406.12275 (two passes, distilled from the model that attends to the image).
    """

    name = "voco"
    kind = "register"
    site = "decoder"
    trained = True
    paper = "VoCo-LLaMA, arXiv 2406.12275"
    config_class = VoCoConfig
    smallest = VoCoConfig(tokens=24, rank=2)

    def __init__(self, config: VoCoConfig | None = None) -> None:
        super().__init__(config)
        chosen = self.config
        self.tokens = nn.Parameter(0.02 * torch.randn(chosen.tokens, chosen.hidden_size))
        query, key = chosen.query_size or chosen.hidden_size, chosen.key_size or chosen.hidden_size
        sizes = {"q": (chosen.hidden_size, query), "k": (chosen.hidden_size, key), "v": (chosen.hidden_size, key)}
        sizes["o"] = (query, chosen.hidden_size)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for part, (into, out) in sizes.items():
            self.down[part] = nn.Parameter(torch.randn(chosen.depth, chosen.rank, into) / max(1, into) ** 0.5)
            self.up[part] = nn.Parameter(torch.zeros(chosen.depth, out, chosen.rank))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """Visual tokens that text attends to from the first layer on.

        Raises:
            UserError: More than there are learned tokens, or another number of layers.
        """
        if keep > self.config.tokens:
            raise UserError(
                f"voco: keep={keep}: this one has {self.config.tokens} learned tokens; give at most as many"
            )
        if depth != self.config.depth:
            raise UserError(f"voco: this one has updates for {self.config.depth} layers, the decoder has {depth}")
        return {0: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The first ``keep`` learned tokens and their positions."""
        x = tokens.features
        self.stages(self.config.depth, tokens.count, keep)
        made = self.tokens[:keep].expand(len(x), -1, -1)
        if not self.config.pooled:
            kept_indices = torch.arange(tokens.count - keep, tokens.count, device=x.device)
            return Reduction(kept_indices.expand(len(x), -1), features=made)
        means, kept_indices, assignment = average_pool(x, tokens.grid, keep)
        return Reduction(
            kept_indices.expand(len(x), -1),
            features=means.to(made.dtype) + made,
            assignment=assignment.expand(len(x), -1),
        )

    def update(self, layer: int, part: str, x: Tensor) -> Tensor:
        """Low-rank update ``[B, K, out]`` of one of `PARTS` for learned tokens ``[B, K, in]``."""
        down, up = self.down[part][layer], self.up[part][layer]
        added: Tensor = x.to(down.dtype) @ down.T @ up.T
        return added
