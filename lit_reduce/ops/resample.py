"""Resampling: K new tokens, each a fixed linear combination of the grid, independent of the image."""

from typing import Literal

import torch
from torch import Tensor

from lit_reduce.ops.cells import lattice
from lit_reduce.ops.similarity import to_float32


def resample(features: Tensor, weights: Tensor) -> Tensor:
    """Apply ``weights`` ``[K, N]`` to features ``[B, N, D]``; ``[B, K, D]`` in the dtype of the features."""
    return (weights.to(to_float32(features)) @ to_float32(features)).to(features.dtype)


def resample_weights(grid: tuple[int, int, int], count: int, k: int, kernel: Literal["tent", "cosine"]) -> Tensor:
    """Weights with which each of ``count`` tokens enters each of ``k`` points of `lattice`.

    ``tent`` is bilinear resizing with antialiasing; ``cosine`` keeps the lowest frequencies of an orthonormal DCT-II,
    as many as there are points. If the points fill a rectangle, both are the usual transforms. Frames that share a
    point are averaged. A constant image stays constant.

    Args:
        grid: Frames, rows, columns.
        count: Number of tokens, N.
        k: Between 1 and N.
        kernel: Interpolation kernel.

    Returns:
        ``[k, count]`` float64; rows sum to 1.
    """
    points = lattice(grid, count, k)
    frames, rows, columns = grid if grid[0] * grid[1] * grid[2] == count else (1, 1, count)
    read = {"tent": _tent, "cosine": _cosine}[kernel]
    time = torch.zeros(k, frames, dtype=torch.float64)
    for point, (during, _, _) in enumerate(points):
        time[point, during.start : during.stop] = 1 / len(during)
    down = read(torch.tensor([band for _, band, _ in points]), rows)
    across = read(torch.tensor([cell for _, _, cell in points]), columns)
    return torch.einsum("kf,kr,kc->kfrc", time, down, across).flatten(1)


def _middle(which: Tensor, length: int) -> Tensor:
    """Centre of part i of n on an axis, in tokens; 0 is the centre of the first token."""
    return (which[:, :1].double() + 0.5) * length / which[:, 1:] - 0.5


def _tent(which: Tensor, length: int) -> Tensor:
    far = (torch.arange(length) - _middle(which, length)).abs()
    weight = (1 - far * which[:, 1:] / length).clamp_min(0)
    return weight / weight.sum(1, keepdim=True)


def _cosine(which: Tensor, length: int) -> Tensor:
    wave = torch.arange(length, dtype=torch.float64)
    scale = (1 + (wave > 0).double()) / length
    here = (torch.pi / length * (_middle(which, length) + 0.5) * wave).cos()
    there = (torch.pi / length * (wave[:, None] + 0.5) * wave).cos()
    return (here * scale * (wave < which[:, 1:])) @ there.T
