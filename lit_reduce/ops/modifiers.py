"""Transformations of features or scores that run before a selector."""

import math

import torch
from torch import Tensor

from lit_reduce.ops.similarity import to_float32


def centre(features: Tensor) -> Tensor:
    """Subtract the mean over the image from features ``[B, N, D]`` (Cen-Prune)."""
    x = to_float32(features)
    return (x - x.mean(1, keepdim=True)).to(features.dtype)


def min_max(scores: Tensor, floor: float = 0.0) -> Tensor:
    """Min-max normalise scores ``[B, N]`` per image: ``(s - min + floor) / (max - min)``; equal scores stay equal."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low + floor) / (high - low).clamp_min(max(floor, 1e-12))


def unit_length(scores: Tensor) -> Tensor:
    """Divide scores ``[B, ..., N]`` by their Euclidean norm over the last dimension."""
    return torch.nn.functional.normalize(to_float32(scores), dim=-1)


def sinks(features: Tensor, threshold: float, dims: tuple[int, ...] = ()) -> Tensor:
    """Tokens with a massive activation ``[B, N]`` bool: some ``|x_d| / rms(x)`` exceeds the threshold.

    VAR reads fixed dimensions of one language model; without ``dims`` this function reads all. A token of D entries
    cannot exceed ``sqrt(D)``.

    Args:
        features: ``[B, N, D]``.
        threshold: 20 in the paper.
        dims: Dimensions to read; empty for all.

    Source: sink tokens of VAR, arXiv 2503.03321.
    """
    x = to_float32(features)
    scaled = (x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)).abs()
    return (scaled[..., list(dims)] if dims else scaled).amax(-1) > threshold


def with_neighbours(chosen: Tensor, grid: tuple[int, int, int], wrap: bool = False) -> Tensor:
    """Add the four neighbours of each selected token in its frame ``[B, N]`` bool.

    Args:
        chosen: ``[B, N]`` bool.
        grid: Frames, rows, columns; if newline tokens make N differ, all tokens count as one row.
        wrap: As index arithmetic of the official code of HiPrune has it: left and right neighbours are those in raster
            order, and one above the first or below the last row is the first or last token of the frame.
    """
    frames, rows, columns = grid if math.prod(grid) == chosen.shape[-1] else (1, 1, chosen.shape[-1])
    here = chosen.view(-1, frames, rows, columns)
    grown = here.clone()
    grown[:, :, 1:] |= here[:, :, :-1]
    grown[:, :, :-1] |= here[:, :, 1:]
    side, target = (here.flatten(2), grown.flatten(2)) if wrap else (here, grown)
    target[..., 1:] |= side[..., :-1]
    target[..., :-1] |= side[..., 1:]
    if wrap:
        target[..., 0] |= here[:, :, 0].any(-1)
        target[..., -1] |= here[:, :, -1].any(-1)
    return grown.flatten(1)
