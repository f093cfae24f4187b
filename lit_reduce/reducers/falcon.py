"""FALCON: registers that walk through the frozen vision tower beside the patches, and say what to keep of them."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import average_pool
from lit_reduce.ops.similarity import normal
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens

PARTS = ("q", "k", "v", "o", "mlp")  # of a block: its queries, keys, values, what attention gives, and its MLP
EVEN = 64  # cells for which the part of the delta that goes by their size is nought


@dataclass
class FalconConfig(ReducerConfig):
    """Where registers join, and how much of the tower they may bend for themselves."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    vision_hidden_size: int = field(default=0, metadata={"help": "width of the vision tower; set when training"})
    blocks: int = field(default=6, metadata={"help": "blocks of the vision tower up to the one before the projector"})
    start: float = field(default=0.34, metadata={"help": "share of the blocks that patches pass before registers join"})
    table: int = field(default=8, metadata={"help": "rows and columns of the tables that give a cell its delta"})
    rank: int = field(default=16, metadata={"help": "of the updates of queries, keys, values, output and MLP; 0: none"})
    projector_rank: int = field(default=128, metadata={"help": "of what registers add behind the projector; 0: none"})
    mix: float = field(default=0.0, metadata={"help": "share of the projected register in a token before training"})
    reatten: int = field(default=32, metadata={"help": "width of the attention between tiles of an image; 0: none"})
    heads: int = field(default=4, metadata={"help": "heads of the attention between tiles"})


@register
class Falcon(Reducer):
    """K registers read the picture on their way through the tower; patches never see them, so the patches stay as ever.

    A register begins as the mean of its cell's patches where it joins, plus a learned delta; from there on it goes
    through the tower's own blocks, sees CLS, all patches and all registers, and has low-rank updates of its own. A
    token is the mean of the cell's projected patches, a learned share (by channel) of the way from there to the
    projected register, and a low-rank map of the register. All that is learned begins at nought: an untrained register
    is its cell's mean, carried on by the frozen blocks, and with ``mix=0`` an untrained token is average pooling.

    Source: FALCON, arXiv 2501.16297: registers (ReCompact), and after each self-attention the attention of the
    registers of all tiles of an image to each other (ReAtten). Our reading, for a frozen tower, is the rest: the
    asymmetric mask, the start from pooled patches before and behind the projector, low-rank updates (in units of what
    they are added to) in place of a tuned tower, projector and full attention between tiles, and a delta that is read
    from small tables by the cell's place and size, so that one set of weights serves every budget.
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
        if c.blocks < 1 or c.table < 1 or min(c.rank, c.projector_rank, c.reatten) < 0:
            raise UserError(f"falcon: blocks={c.blocks} and table={c.table} must be 1 or more, ranks 0 or more")
        if not 0 <= c.start < 1:
            raise UserError(f"falcon: start={c.start} must be a share of the blocks, 0 or more and below 1")
        if c.reatten and (c.heads < 1 or c.reatten % c.heads):
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
        """The block before which registers join."""
        share: float = self.config.start
        return min(depth - 1, round(share * depth))

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002  (any count of patches)
        """All registers join at once.

        Raises:
            UserError: a tower of another depth than these weights are for.
        """
        if depth != self.config.blocks:
            raise UserError(
                f"falcon: blocks={self.config.blocks}, but {depth} blocks of this vision tower feed the projector; "
                f"train with reducer.options.blocks={depth}"
            )
        return {self.first(depth): keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The registers where they join: each stands at the centre of its cell.

        Raises:
            UserError: states of another width than these weights are for.
        """
        x = tokens.features
        if x.shape[-1] != len(self.place):
            raise UserError(
                f"falcon: the vision tower is {x.shape[-1]} wide, but vision_hidden_size={len(self.place)}; "
                f"train with reducer.options.vision_hidden_size={x.shape[-1]}"
            )
        pooled, kept_indices, owner = average_pool(x, tokens.grid, keep)
        made = pooled + _scale(pooled) * self.delta(tokens.grid, owner, keep).to(pooled.dtype)
        return Reduction(kept_indices.expand(len(x), -1), features=made, assignment=owner.expand(len(x), -1))

    def delta(self, grid: tuple[int, int, int], owner: Tensor, keep: int) -> Tensor:
        """What is added to the mean of each cell ``[K, C]``, in units of it: by its place, and by log2 of its size."""
        count, (frames, rows, columns) = len(owner), grid
        if frames * rows * columns != count:  # newline tokens: one row, as `cells` takes it
            rows, columns = 1, count
        index, sizes = torch.arange(count, device=owner.device), owner.bincount(minlength=keep)
        spots = torch.stack([(index % columns + 0.5) / columns, (index // columns % rows + 0.5) / rows], -1)
        middle = spots.new_zeros(keep, 2).index_add(0, owner, spots) / sizes[:, None]
        tables = torch.stack([self.place, self.size])
        where = (2 * middle - 1).to(tables.dtype).expand(2, 1, -1, -1)
        place, size = F.grid_sample(tables, where, padding_mode="border", align_corners=False)[:, :, 0]
        delta: Tensor = (place + (EVEN * sizes / count).log2().to(size.dtype) * size).T
        return delta

    def adapt(self, block: int, part: str, x: Tensor, y: Tensor) -> Tensor:
        """What a part of the tower gives for registers.

        Args:
            block: Of the tower.
            part: One of `PARTS`.
            x: ``[T, K, C]``, what went into the part.
            y: ``[T, K, C]``, what the frozen part gave.
        """
        name = f"{block}_{part}"
        out: Tensor = self.updates[name](x, y) if name in self.updates else y
        return out

    def together(self, block: int, x: Tensor, tiles: list[int]) -> Tensor:
        """ReAtten: adds what registers see in the other tiles of their image; one tile alone stays as it is.

        Args:
            block: Of the tower.
            x: ``[T, K, C]``, what the block's self-attention gave for registers.
            tiles: How many of the T tiles belong to each image.
        """
        if str(block) not in self.between or max(tiles) == 1:
            return x
        attend = self.between[str(block)]
        parts = [attend(part.flatten(0, 1)[None]).view_as(part) if len(part) > 1 else part for part in x.split(tiles)]
        return torch.cat(parts)

    def leave(self, x: Tensor, y: Tensor, pooled: Tensor) -> Tensor:
        """The tokens.

        Args:
            x: ``[T, K, C]`` registers behind the tower.
            y: ``[T, K, D]``, what the frozen projector makes of them.
            pooled: ``[T, K, D]``, the mean of what it makes of the patches of each cell.
        """
        made = pooled + self.mix.to(y.dtype) * (y - pooled)
        out: Tensor = made if self.say is None else self.say(x, made)
        return out


class _Update(nn.Module):
    """A low-rank map beside a frozen one, in units of what that one gives; nought at first."""

    def __init__(self, inner: int, outer: int, rank: int, bent: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inner, rank, bias=False), nn.Linear(rank, outer, bias=False)
        self.bent = bent
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        small = self.down(normal(x.to(self.down.weight.dtype)))
        more: Tensor = self.up(F.gelu(small) if self.bent else small)
        return y + _scale(y) * more.to(y.dtype)


class _Between(nn.Module):
    """Attention of low rank among all registers of an image, added to them; nought at first."""

    def __init__(self, width: int, rank: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(width, 3 * rank, bias=False)
        self.leave = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.ask(normal(x.to(self.ask.weight.dtype))).unflatten(-1, (3, self.heads, -1))
        q, k, v = asked.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        more: Tensor = self.leave(read)
        return x + _scale(x) * more.to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    """The size of each row ``[..., 1]``; no gradient, so that nothing grows by way of its unit."""
    return x.detach().square().mean(-1, keepdim=True).sqrt()
