"""Cutting the token grid into exactly K cells, the common ground of the grid selector, pooling and resampling."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def cells(grid: tuple[int, int, int], count: int, k: int) -> tuple[Tensor, Tensor]:
    """Cut a grid into ``k`` even cells, every token in exactly one.

    Within a frame the cells form a near-square grid (64 of 24 x 24: 8 x 8). Where ``k`` has no factors with cells
    flatter than 2 : 1, bands get one cell more or less each, so that the count is ``k`` all the same. Frames share
    ``k`` evenly, and neighbouring frames share a cell when there are fewer cells than frames. When newline tokens
    make ``count`` differ from the grid, the raster sequence is cut into ``k`` even runs. Our reading of "uniform".

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        The token at each cell's centre ``[k]``, ascending, and the cell of each token ``[count]``, both int64.
    """
    kept_indices, assignment = _cut(tuple(grid), count, k)
    return torch.tensor(kept_indices), torch.tensor(assignment)


def members(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The tokens of each of ``k`` cells, none of them empty.

    Args:
        assignment: ``[N]``, the cell of each token.
        k: Cells.

    Returns:
        Indices ``[k, M]``, ascending in each cell, M being the largest cell's count, and which of them are real.
    """
    sizes = assignment.bincount(minlength=k)[:, None]
    slots = torch.arange(int(sizes.max()), device=assignment.device)
    real = slots < sizes
    first = sizes.cumsum(0) - sizes
    return assignment.argsort(stable=True)[(first + slots).where(real, first)], real


def lattice(grid: tuple[int, int, int], count: int, k: int) -> list[tuple[range, tuple[int, int], tuple[int, int]]]:
    """The same cells without rounding to whole tokens: the points of an even ``k``-fold resampling.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        For each cell, in the order of `cells`: its frames, (which band of how many), (which cell of how many in it).
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
    """Cut one frame into bands of rows, each band into columns; ``k`` cells in all."""
    count = _band_count(rows, columns, k)
    shares = _shares(k, count)
    return [(band, _split(columns, share)) for band, share in zip(_split(rows, count), shares, strict=True)]


def _band_count(rows: int, columns: int, k: int) -> int:
    """Bands that make cells as square as can be: an exact divisor of ``k`` if its cells stay within 2 : 1."""

    def flatness(bands: int) -> float:
        return abs(math.log(rows / bands) - math.log(columns * bands / k))

    fitting = range(math.ceil(k / columns), min(rows, k) + 1)
    even = [bands for bands in fitting if k % bands == 0 and flatness(bands) <= math.log(2) + 1e-9]
    return min(even or fitting, key=flatness)


def _split(length: int, parts: int) -> list[tuple[int, int]]:
    return [(i * length // parts, (i + 1) * length // parts) for i in range(parts)]


def _shares(total: int, parts: int) -> list[int]:
    return [last - first for first, last in _split(total, parts)]
