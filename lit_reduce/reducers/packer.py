"""TokenPacker: the points of a coarse grid, each of which reads the region of the picture that it stands for."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.cells import members
from lit_reduce.ops.mergers import average_pool
from lit_reduce.ops.similarity import normal
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class PackerConfig(ReducerConfig):
    """Size of the packer, and what it reads."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    vision_hidden_size: int = field(default=0, metadata={"help": "width of the vision tower; set when training"})
    width: int = field(default=128, metadata={"help": "width of the attention from points to regions"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    levels: list[float] = field(
        default_factory=list,
        metadata={"help": "layers of the vision tower that points read too: 3, -2, or 0.5 for a share of the depth"},
    )
    text: bool = field(default=False, metadata={"help": "let the prompt take part in what points look for (QueCC)"})


@register
class Packer(Reducer):
    """K even cells of any grid; each cell's mean, the point, attends to the cell's tokens and adds what it reads.

    Queries are maps of the points, keys and values two-layer maps of the tokens, with a norm behind each; a query meets
    the keys of its own region alone. Regions may be of unequal size, and no weight depends on K, so that one set of
    weights serves every budget. The last map starts at zero: an untrained packer is average pooling, to the bit.

    Source: TokenPacker, arXiv 2407.02392, which replaces the projector. Our reading, for a frozen projector: points
    and tokens come from behind it (``levels`` adds the paper's layers of the tower), what a point reads is added to the
    pooled token, in units of that token's size, and attention has no maps beside those of queries, keys and values.

    With ``text`` the mean of the prompt's embeddings is added to each query (QueCC, arXiv 2411.03312, where it is the
    language model's last state of the prompt and a learned convolution makes the points: our reading).
    """

    name = "packer"
    kind = "resample"
    site = "projector"
    trained = True
    warmup_target = "tokens"
    paper = "TokenPacker, arXiv 2407.02392"
    config_class = PackerConfig
    smallest = PackerConfig(width=12, heads=3, levels=[0.5], text=True)

    def __init__(self, config: PackerConfig | None = None) -> None:
        super().__init__(config)
        size, width, levels = self.config.hidden_size, self.config.width, self.config.levels
        if min(width, self.config.heads) < 1 or width % self.config.heads:
            raise UserError(f"packer: width={width} must be a multiple of heads={self.config.heads}")
        if not isinstance(levels, list) or not all(type(layer) in (int, float) for layer in levels):
            raise UserError(f"packer: levels={levels} must be a list of layers, such as [0.5, -1]")
        self.levels = [f"encoder@{layer}" for layer in levels]
        self.signals = frozenset([*self.levels, *(["text"] if self.config.text else [])])
        seen = size + len(levels) * self.config.vision_hidden_size
        self.point, self.normal = nn.Linear(size, width, bias=False), nn.LayerNorm(width, eps=1e-6)
        self.key, self.value = _branch(seen, width), _branch(seen, width)
        self.ask = nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width, eps=1e-6)) if self.config.text else None
        last = nn.Linear(width, size, bias=False)
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(nn.Linear(width, width), nn.GELU(), last)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """New tokens at the centres of their regions."""
        x = tokens.features
        pooled, kept_indices, owner = average_pool(x, tokens.grid, keep)
        query = self.point(normal(pooled))
        if self.ask is not None:
            query = query + self.ask(_prompt(tokens))[:, None]
        seen = torch.cat([normal(x), *(normal(level(tokens, name, self)) for name in self.levels)], -1)
        read = self._attend(self.normal(query), self.key(seen), self.value(seen), *members(owner, keep))
        scale = pooled.square().mean(-1, keepdim=True).sqrt()
        made = pooled + scale * self.leave(read)
        return Reduction(kept_indices.expand(len(x), -1), features=made, assignment=owner.expand(len(x), -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor, real: Tensor) -> Tensor:
        """What each point ``[B, K, W]`` reads of the tokens ``[B, N, W]`` that ``inside`` ``[K, M]`` names."""
        batch, points, width = query.shape
        heads = self.config.heads
        q = query.view(batch * points, heads, 1, -1)
        k, v = (
            part[:, inside].view(batch * points, -1, heads, width // heads).transpose(1, 2) for part in (key, value)
        )
        mask = real.expand(batch, -1, -1).reshape(batch * points, 1, 1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(batch, points, width)


def level(tokens: VisualTokens, name: str, reducer: Reducer) -> Tensor:
    """Features of one layer of the tower ``[B, N, Dv]``, of the width that the reducer was made for.

    Raises:
        UserError: the tower has another width.
    """
    x, width = tokens.signal(name), reducer.config.vision_hidden_size
    if x.shape[-1] != width:
        raise UserError(
            f"{reducer.name}: '{name}' has width {x.shape[-1]}, but vision_hidden_size={width}; "
            f"train with reducer.options.vision_hidden_size={x.shape[-1]}"
        )
    return x


def _branch(size: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
    )  # fmt: skip


def _prompt(tokens: VisualTokens) -> Tensor:
    """The mean ``[B, D]`` of the prompt's real tokens."""
    text, real = tokens.signal("text"), tokens.signal("text_mask")[..., None]
    return normal(text).masked_fill(~real, 0).sum(1) / real.sum(1).clamp_min(1)
