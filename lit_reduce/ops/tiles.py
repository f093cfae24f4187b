"""Tiles: an overview of the picture and crops of it that lie side by side, as one run of tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Where an image's tokens lie.

    Attributes:
        first: Index of the overview's first token; its tokens follow one another.
        overview: Rows and columns of the overview.
        whole: Rows and columns of all crops side by side.
        crops: Crops on top of and beside one another.
        place: ``[N]`` raster index in the whole; -1 for the overview and for newline tokens.
    """

    first: int
    overview: tuple[int, int]
    whole: tuple[int, int]
    crops: tuple[int, int]
    place: Tensor

    @property
    def part(self) -> Tensor:
        """``[N]``: 0 for the overview, then one number a crop, then one for newline tokens."""
        part = 1 + regions(self.whole, self.crops)[self.place.clamp_min(0)]
        part[self.place < 0] = 1 + math.prod(self.crops)
        part[self.first : self.first + math.prod(self.overview)] = 0
        return part


def tiling(grid: tuple[int, int, int], count: int, overview: str = "first") -> Tiling | None:
    """How tokens in tiles lie, or None for a picture in one piece.

    Frames are tiles, crops in raster order in the most nearly square arrangement, not higher than wide: our reading,
    where a grid says no more. Or one frame of all crops with a newline behind each row, after a square overview: the
    packed images of LLaVA-NeXT; the whole may have been cut to the image's shape.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of the image.
        overview: ``first`` or ``last`` of the frames.
    """
    frames, rows, columns = grid
    each = rows * columns
    if frames > 1 and frames * each == count:
        down = max(n for n in range(1, math.isqrt(frames - 1) + 1) if (frames - 1) % n == 0)
        across = (frames - 1) // down
        crop = torch.arange(frames - 1)[:, None, None]
        row = crop // across * rows + torch.arange(rows)[:, None]
        place = (row * across * columns + crop % across * columns + torch.arange(columns)).flatten()
        seam = 0 if overview == "first" else count - each
        place = torch.cat([place[:seam], torch.full((each,), -1), place[seam:]])
        return Tiling(seam, (rows, columns), (down * rows, across * columns), (down, across), place)
    side = math.isqrt(max(0, count - rows * (columns + 1)))
    if frames == 1 and side and side**2 + rows * (columns + 1) == count:
        place = torch.arange(rows * columns).view(rows, columns)
        place = torch.cat([place, torch.full((rows, 1), -1)], 1).flatten()
        place = torch.cat([torch.full((side**2,), -1), place])
        return Tiling(0, (side, side), (rows, columns), (math.ceil(rows / side), math.ceil(columns / side)), place)
    return None


def regions(shape: tuple[int, int], crops: tuple[int, int], stripes: bool = False) -> Tensor:
    """Which crop each cell of a raster that shows the whole picture belongs to ``[rows * columns]``.

    Args:
        shape: Rows and columns of the raster.
        crops: Crops on top of and beside one another.
        stripes: Cut the raster sequence into even runs instead: HiRED's official code.
    """
    rows, columns = shape
    if stripes:
        return torch.arange(rows * columns) * math.prod(crops) // (rows * columns)
    down, across = torch.arange(rows) * crops[0] // rows, torch.arange(columns) * crops[1] // columns
    return (down[:, None] * crops[1] + across).flatten()
