"""Layout of images that are encoded as an overview and crops (tiles) in one sequence of tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Positions of an image's tokens in the overview and the crops.

    Attributes:
        first: Index of the first token of the overview; its tokens are contiguous.
        overview: Rows and columns of the overview.
        whole: Rows and columns of all crops together.
        crops: Number of crops vertically and horizontally.
        place: ``[N]``, raster index among all crops; -1 for the overview and for newline tokens.
    """

    first: int
    overview: tuple[int, int]
    whole: tuple[int, int]
    crops: tuple[int, int]
    place: Tensor

    @property
    def part(self) -> Tensor:
        """Part of each token ``[N]``: 0 for the overview, then one number per crop, then one for newline tokens."""
        part = 1 + regions(self.whole, self.crops)[self.place.clamp_min(0)]
        part[self.place < 0] = 1 + math.prod(self.crops)
        part[self.first : self.first + math.prod(self.overview)] = 0
        return part


def tiling(grid: tuple[int, int, int], count: int, overview: str = "first") -> Tiling | None:
    """Infer the layout of tiles from grid and token count; None for an image without tiles.

    Several frames are tiles: an overview and crops in raster order, in the most nearly square arrangement that is not
    higher than wide (our reading, since the grid says no more). A single frame with a newline after each row and a
    square overview in front is a packed image of LLaVA-NeXT; all crops together may have been cropped to the shape of
    the image.

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
    """The crop that each cell of a raster over the whole image belongs to ``[rows * columns]``.

    Args:
        shape: Rows and columns of the raster.
        crops: Number of crops vertically and horizontally.
        stripes: Split the raster sequence into even runs instead (official code of HiRED).
    """
    rows, columns = shape
    if stripes:
        return torch.arange(rows * columns) * math.prod(crops) // (rows * columns)
    down, across = torch.arange(rows) * crops[0] // rows, torch.arange(columns) * crops[1] // columns
    return (down[:, None] * crops[1] + across).flatten()
