"""FALCON: register tokens that pass through the frozen vision tower beside the patches and replace them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import average_pool
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens

PARTS = ("q", "k", "v", "o", "mlp")  # of a block: queries, keys, values, attention output, MLP
EVEN = 64  # number of cells at which the size-dependent part of the offset is zero


@dataclass
class FalconConfig(ReducerConfig):
    """Where registers enter the tower, and the ranks of their updates."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    vision_hidden_size: int = option(0, "width of the vision tower; set when training", min=0)
    blocks: int = option(23, "blocks of the vision tower up to the one before the projector", min=1)
    start: float = option(0.34, "share of the blocks that patches pass before registers join", min=0, below=1)
    table: int = option(8, "rows and columns of the tables that give a cell its delta", min=1)
    rank: int = option(16, "of the updates of queries, keys, values, output and MLP; 0: none", min=0)
    projector_rank: int = option(128, "of what registers add behind the projector; 0: none", min=0)
    mix: float = option(0.0, "share of the projected register in a token before training")
    reatten: int = option(32, "width of the attention between tiles of an image; 0: none", min=0)
    heads: int = option(4, "heads of the attention between tiles", min=1)


@register
class Falcon(Reducer):
    """K register tokens attend to the patches in the vision tower; patches do not attend to them and stay unchanged.

    A register starts as the mean of the patches of its cell at the block where it enters, plus a learned offset. It
    then passes through the frozen blocks, attends to CLS, all patches and all registers, and has its own low-rank
    updates. An output token is the mean of the projected patches of the cell, moved by a learned fraction (per channel)
    towards the projected register, plus a low-rank map of the register. All learned weights are initialised to zero: an
    untrained register is the mean of its cell passed through the frozen blocks, and with ``mix=0`` an untrained output
    token is average pooling.

    Source: FALCON, arXiv 2501.16297: registers (ReCompact), and attention between the registers of all tiles of an
    image after each self-attention (ReAtten). Our readings, for a frozen tower: the asymmetric mask; initialisation
    from pooled patches before and after the projector; low-rank updates (relative to the norm of their target) instead
    of a fine-tuned tower, projector and full attention between tiles; and offsets interpolated from small tables by
    position and size of the cell, so that one set of weights serves every budget.
    """

    name = "falcon"
    kind = "register"
    site = "encoder"
    trained = True
    warmup_target = "tokens"
    paper = "FALCON, arXiv 2501.16297"
    config_class = FalconConfig
    smallest = FalconConfig(table=3, rank=2, projector_rank=4, reatten=0)

    def __init__(self, config: FalconConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        if c.reatten % c.heads:
            raise UserError(f"falcon: reatten={c.reatten} must be a multiple of heads={c.heads}")
        width = c.vision_hidden_size
        self.place = nn.Parameter(torch.zeros(width, c.table, c.table))
        self.size = nn.Parameter(torch.zeros(width, c.table, c.table))
        own, part = range(self.first(c.blocks), c.blocks), nn.ModuleDict
        self.updates = part(
            {f"{i}_{name}": _Update(width, width, c.rank, name == "mlp") for i in own for name in PARTS if c.rank}
        )
        self.between = part({str(i): _Between(width, c.reatten, c.heads) for i in own if c.reatten})
        self.mix = nn.Parameter(torch.full((c.hidden_size,), float(c.mix)))
        self.say = _Update(width, c.hidden_size, c.projector_rank, True) if c.projector_rank else None

    def first(self, depth: int) -> int:
        """Index of the block before which registers enter."""
        share: float = self.config.start
        return min(depth - 1, round(share * depth))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002  (any count of patches)
        """All registers enter at once.

        Raises:
            UserError: The tower has another depth than these weights.
        """
        if depth != self.config.blocks:
            raise UserError(
                f"falcon: blocks={self.config.blocks}, but {depth} blocks of this vision tower feed the projector; "
                f"train with reducer.options.blocks={depth}"
            )
        return {self.first(depth): keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Initial registers, each at the centre of its cell.

        Raises:
            UserError: The states have another width than these weights.
        """
        x = tokens.features
        if x.shape[-1] != len(self.place):
            raise UserError(
                f"falcon: the vision tower is {x.shape[-1]} wide, but vision_hidden_size={len(self.place)}; "
                f"train with reducer.options.vision_hidden_size={x.shape[-1]}"
            )
        pooled, kept_indices, assignment = average_pool(x, tokens.grid, keep)
        made = pooled + _scale(pooled) * self.delta(tokens.grid, assignment, keep).to(pooled.dtype)
        return Reduction(kept_indices.expand(len(x), -1), features=made, assignment=assignment.expand(len(x), -1))

    def delta(self, grid: tuple[int, int, int], assignment: Tensor, keep: int) -> Tensor:
        """Offset of each register ``[K, C]``, relative to its cell's mean, from position and log2 of the size."""
        count, (frames, rows, columns) = len(assignment), grid
        if frames * rows * columns != count:  # newline tokens: one row, as `cells` takes it
            rows, columns = 1, count
        index, sizes = torch.arange(count, device=assignment.device), assignment.bincount(minlength=keep)
        spots = torch.stack([(index % columns + 0.5) / columns, (index // columns % rows + 0.5) / rows], -1)
        middle = spots.new_zeros(keep, 2).index_add(0, assignment, spots) / sizes[:, None]
        tables = torch.stack([self.place, self.size])
        where = (2 * middle - 1).to(tables.dtype).expand(2, 1, -1, -1)
        place, size = F.grid_sample(tables, where, padding_mode="border", align_corners=False)[:, :, 0]
        delta: Tensor = (place + (EVEN * sizes / count).log2().to(size.dtype) * size).T
        return delta

    def adapt(self, block: int, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Output of a part of a block for registers, with the low-rank update added.

        Args:
            block: Index of the block.
            part: One of `PARTS`.
            x: ``[T, K, C]``, input of the part.
            y: ``[T, K, C]``, output of the frozen part.
        """
        name = f"{block}_{part}"
        out: Tensor = self.updates[name](x, y) if name in self.updates else y
        return out

    def together(self, block: int, x: Tensor, tiles: list[int]) -> Tensor:
        """ReAtten: attention between the registers of all tiles of an image; a single tile is unchanged.

        Args:
            block: Index of the block.
            x: ``[T, K, C]``, output of the block's self-attention for registers.
            tiles: Number of tiles of each image, T in all.
        """
        if str(block) not in self.between or max(tiles) == 1:
            return x
        attend = self.between[str(block)]
        parts = [attend(part.flatten(0, 1)[None]).view_as(part) if len(part) > 1 else part for part in x.split(tiles)]
        return torch.cat(parts)

    def leave(self, x: Tensor, y: Tensor, pooled: Tensor) -> Tensor:
        """Output tokens ``[T, K, D]``.

        Args:
            x: ``[T, K, C]``, registers after the tower.
            y: ``[T, K, D]``, registers after the frozen projector.
            pooled: ``[T, K, D]``, mean of the projected patches of each cell.
        """
        made = pooled + self.mix.to(y.dtype) * (y - pooled)
        out: Tensor = made if self.say is None else self.say(x, made)
        return out


class _Update(nn.Module):
    """Low-rank update of a frozen map, relative to the norm of its output; initialised to zero."""

    def __init__(self, inner: int, outer: int, rank: int, bent: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inner, rank, bias=False), nn.Linear(rank, outer, bias=False)
        self.bent = bent
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        small = self.down(rms_normalize(x.to(self.down.weight.dtype)))
        more: Tensor = self.up(F.gelu(small) if self.bent else small)
        return y + _scale(y) * more.to(y.dtype)


class _Between(nn.Module):
    """Low-rank attention between all registers of an image, with a residual; initialised to zero."""

    def __init__(self, width: int, rank: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(width, 3 * rank, bias=False)
        self.leave = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.ask(rms_normalize(x.to(self.ask.weight.dtype))).unflatten(-1, (3, self.heads, -1))
        q, k, v = asked.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        more: Tensor = self.leave(read)
        return x + _scale(x) * more.to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    """RMS of each row ``[..., 1]``, without gradient."""
    return x.detach().square().mean(-1, keepdim=True).sqrt()
