"""TokenPacker: pooled tokens that cross-attend to the region they were pooled from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.cells import members
from lit_reduce.ops.mergers import average_pool
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class PackerConfig(ReducerConfig):
    """Size of the attention, and further inputs."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    vision_hidden_size: int = option(0, "width of the vision tower; set when training", min=0)
    width: int = option(128, "width of the attention from points to regions", min=1)
    heads: int = option(4, "attention heads", min=1)
    levels: list[float] = option(
        [], "layers of the vision tower that points read too: 3, -2, or 0.5 for a share of the depth"
    )
    text: bool = option(False, "let the prompt take part in what points look for (QueCC)")


@register
class Packer(Reducer):
    """Average pooling to K cells, where each pooled token attends to the tokens of its cell and adds the result.

    Queries are linear maps of the pooled tokens, keys and values two-layer maps of the tokens, each followed by a norm.
    A query attends to the keys of its own cell only. Cells may differ in size and no weight depends on K, so one set of
    weights serves every budget. The last map is initialised to zero: an untrained packer is average pooling, to the
    bit.

    Source: TokenPacker, arXiv 2407.02392, which replaces the projector. Our readings, for a frozen projector: the
    inputs are projected tokens (``levels`` adds the paper's layers of the tower); the attention output is added to the
    pooled token, relative to its norm; and the attention has no maps beside those of queries, keys and values.

    With ``text`` the mean prompt embedding is added to each query (QueCC, arXiv 2411.03312, which uses the last hidden
    state of the prompt and a learned convolution instead of pooling: our reading).
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
        if width % self.config.heads:
            raise UserError(f"packer: width={width} must be a multiple of heads={self.config.heads}")
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
        """New tokens at the centres of their cells."""
        x = tokens.features
        pooled, kept_indices, assignment = average_pool(x, tokens.grid, keep)
        query = self.point(rms_normalize(pooled))
        if self.ask is not None:
            query = query + self.ask(_prompt(tokens))[:, None]
        seen = torch.cat(
            [rms_normalize(x), *(rms_normalize(tower_features(tokens, name, self)) for name in self.levels)], -1
        )
        read = self._attend(self.normal(query), self.key(seen), self.value(seen), *members(assignment, keep))
        scale = pooled.square().mean(-1, keepdim=True).sqrt()
        made = pooled + scale * self.leave(read)
        return Reduction(kept_indices.expand(len(x), -1), features=made, assignment=assignment.expand(len(x), -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor, real: Tensor) -> Tensor:
        """Attend from each query ``[B, K, W]`` to the tokens ``[B, N, W]`` at ``inside`` ``[K, M]``."""
        batch, points, width = query.shape
        heads = self.config.heads
        q = query.view(batch * points, heads, 1, -1)
        k, v = (
            part[:, inside].view(batch * points, -1, heads, width // heads).transpose(1, 2) for part in (key, value)
        )
        mask = real.expand(batch, -1, -1).reshape(batch * points, 1, 1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(batch, points, width)


def tower_features(tokens: VisualTokens, name: str, reducer: Reducer) -> Tensor:
    """Features of one layer of the vision tower ``[B, N, Dv]``, checked to have the expected width.

    Raises:
        UserError: The tower has another width.
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
    """Mean ``[B, D]`` of the prompt's real tokens."""
    text, real = tokens.signal("text"), tokens.signal("text_mask")[..., None]
    return rms_normalize(text).masked_fill(~real, 0).sum(1) / real.sum(1).clamp_min(1)
