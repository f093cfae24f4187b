"""VoCo-LLaMA: a few learned tokens read the picture inside the language model; the words read only them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import average_pool
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens

PARTS = ("q", "k", "v", "o")  # the linear maps of a layer's attention that have an update


@dataclass
class VoCoConfig(ReducerConfig):
    """Number of the tokens and size of the updates."""

    hidden_size: int = field(default=0, metadata={"help": "width of the language model; set when training"})
    depth: int = field(default=0, metadata={"help": "layers of the language model; set when training"})
    tokens: int = field(default=64, metadata={"help": "learned tokens; keep=K uses the first K of them"})
    pooled: bool = field(
        default=True, metadata={"help": "whether each begins as the mean of its part of the picture, and stands there"}
    )
    rank: int = field(default=32, metadata={"help": "rank of the updates of each layer's q, k, v and o; 0 for none"})
    query_size: int = field(default=0, metadata={"help": "width of all queries together; 0: the hidden size"})
    key_size: int = field(default=0, metadata={"help": "width of all keys together; 0: the hidden size"})


@register
class VoCo(Reducer):
    """Learned tokens ``[K, D]`` stand behind the picture and see it in every layer; later words see them instead.

    Low-rank updates of q, k, v and o act on the learned tokens alone, so that all words and the picture keep the
    weights of the frozen model, to the bit. They start at zero. The paper trains the whole model and hides words before
    the picture from those behind it; here they stay visible. The paper's tokens are alike for all pictures and have
    positions of their own. Here each is added to the mean of a cell of the picture and takes the position of its
    centre, so that an untrained one is average pooling that reads on, and a frozen model has less to learn; without
    ``pooled`` they are the paper's, at the positions of the picture's last tokens. Words keep their positions in either
    case. All this is our reading.

    The prompt up to the picture's end is read in full by the frozen model, so the first answer about a picture comes no
    sooner. What is saved is the cache, time at each decoded token, and the picture for every further question about it
    (`Attachment.digest`).

    Source: VoCo-LLaMA, arXiv 2406.12275 (two passes; distilled against the model that sees the picture, as its eq. of
    the objective has it).
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
        if chosen.tokens < 1 or chosen.rank < 0:
            raise UserError(f"voco: tokens={chosen.tokens}, rank={chosen.rank}: give 1 or more, and 0 or more")
        self.tokens = nn.Parameter(0.02 * torch.randn(chosen.tokens, chosen.hidden_size))
        query, key = chosen.query_size or chosen.hidden_size, chosen.key_size or chosen.hidden_size
        sizes = {"q": (chosen.hidden_size, query), "k": (chosen.hidden_size, key), "v": (chosen.hidden_size, key)}
        sizes["o"] = (query, chosen.hidden_size)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for part, (into, out) in sizes.items():
            self.down[part] = nn.Parameter(torch.randn(chosen.depth, chosen.rank, into) / max(1, into) ** 0.5)
            self.up[part] = nn.Parameter(torch.zeros(chosen.depth, out, chosen.rank))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """What words see from the first layer on.

        Raises:
            UserError: more than there are learned tokens, or another number of layers.
        """
        if keep > self.config.tokens:
            raise UserError(
                f"voco: keep={keep}: this one has {self.config.tokens} learned tokens; give at most as many"
            )
        if depth != self.config.depth:
            raise UserError(f"voco: this one has updates for {self.config.depth} layers, the decoder has {depth}")
        return {0: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The first ``keep`` learned tokens, and the places that they take."""
        x = tokens.features
        self.stages(self.config.depth, tokens.count, keep)
        made = self.tokens[:keep].expand(len(x), -1, -1)
        if not self.config.pooled:
            kept_indices = torch.arange(tokens.count - keep, tokens.count, device=x.device)
            return Reduction(kept_indices.expand(len(x), -1), features=made)
        means, kept_indices, owner = average_pool(x, tokens.grid, keep)
        return Reduction(
            kept_indices.expand(len(x), -1), features=means.to(made.dtype) + made, assignment=owner.expand(len(x), -1)
        )

    def update(self, layer: int, part: str, x: Tensor) -> Tensor:
        """What learned tokens ``[B, K, in]`` get beside the frozen map of one of `PARTS`, ``[B, K, out]``."""
        down, up = self.down[part][layer], self.up[part][layer]
        added: Tensor = x.to(down.dtype) @ down.T @ up.T
        return added
