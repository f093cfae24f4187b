"""Partition of the token grid into exactly K cells, shared by grid selection, pooling and resampling."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def cells(grid: tuple[int, int, int], count: int, k: int) -> tuple[Tensor, Tensor]:
    """Partition a grid into ``k`` cells of even size.

    Within a frame the cells form a near-square grid (64 of 24 x 24: 8 x 8). If ``k`` has no divisor with cells flatter
    than 2 : 1, the bands of rows get one cell more or less each, so that the count is still ``k``. Frames share ``k``
    evenly; with fewer cells than frames, neighbouring frames share a cell. If newline tokens make ``count`` differ from
    the grid size, the raster sequence is split into ``k`` even runs. This reading of "uniform" is ours.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        Index of the token at the centre of each cell ``[k]``, ascending, and the cell of each token ``[count]``, both
        int64.
    """
    kept_indices, assignment = _cut(tuple(grid), count, k)
    return torch.tensor(kept_indices), torch.tensor(assignment)


def members(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the tokens in each of ``k`` non-empty cells, padded to the largest cell.

    Args:
        assignment: ``[N]``, the cell of each token.
        k: Number of cells.

    Returns:
        Indices ``[k, M]``, ascending in each cell, where M is the size of the largest cell, and a mask ``[k, M]`` of
        the valid ones.
    """
    sizes = assignment.bincount(minlength=k)[:, None]
    slots = torch.arange(int(sizes.max()), device=assignment.device)
    real = slots < sizes
    first = sizes.cumsum(0) - sizes
    return assignment.argsort(stable=True)[(first + slots).where(real, first)], real


def lattice(grid: tuple[int, int, int], count: int, k: int) -> list[tuple[range, tuple[int, int], tuple[int, int]]]:
    """The cells of `cells` in continuous coordinates, without rounding to whole tokens.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        For each cell, in the order of `cells`: its frames, (index of its band, number of bands), (index within the
        band, number of cells in the band).
    """
    frames, rows, columns = _shape(grid, count)
    shares = [1] * k if k <= frames else _shares(k, frames)
    return [
        (range(first, last), (band, len(bands)), (cell, len(cuts)))
        for number, (first, last) in enumerate(_split(frames, min(k, frames)))
        for bands in [_bands(rows, columns, shares[number])]
        for band, (_, cuts) in enumerate(bands)
        for cell in range(len(cuts))
    ]


def _shape(grid: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    return grid if math.prod(grid) == count else (1, 1, count)


@lru_cache(maxsize=256)
def _cut(grid: tuple[int, int, int], count: int, k: int) -> tuple[list[int], list[int]]:
    if not 1 <= k <= count:
        raise ValueError(f"cannot cut {count} tokens into {k} cells")
    frames, rows, columns = _shape(grid, count)
    kept_indices: list[int] = []
    assignment = [-1] * count
    for first, last in _split(frames, min(k, frames)):
        share = 1 if k <= frames else _shares(k, frames)[first]
        for band, cuts in _bands(rows, columns, share):
            for left, right in cuts:
                members = [
                    (frame * rows + row) * columns + column
                    for frame in range(first, last)
                    for row in range(*band)
                    for column in range(left, right)
                ]
                for member in members:
                    assignment[member] = len(kept_indices)
                middle = [(low + high - 1) // 2 for low, high in ((first, last), band, (left, right))]
                kept_indices.append((middle[0] * rows + middle[1]) * columns + middle[2])
    return kept_indices, assignment


def _bands(rows: int, columns: int, k: int) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Split one frame into bands of rows and each band into cells; ``k`` cells in all."""
    count = _band_count(rows, columns, k)
    shares = _shares(k, count)
    return [(band, _split(columns, share)) for band, share in zip(_split(rows, count), shares, strict=True)]


def _band_count(rows: int, columns: int, k: int) -> int:
    """Number of bands that makes the cells nearly square; a divisor of ``k`` if its cells stay within 2 : 1."""

    def flatness(bands: int) -> float:
        return abs(math.log(rows / bands) - math.log(columns * bands / k))

    fitting = range(math.ceil(k / columns), min(rows, k) + 1)
    even = [bands for bands in fitting if k % bands == 0 and flatness(bands) <= math.log(2) + 1e-9]
    return min(even or fitting, key=flatness)


def _split(length: int, parts: int) -> list[tuple[int, int]]:
    return [(i * length // parts, (i + 1) * length // parts) for i in range(parts)]


def _shares(total: int, parts: int) -> list[int]:
    return [last - first for first, last in _split(total, parts)]
