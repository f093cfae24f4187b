"""Counts that follow from the scores themselves, image by image, and selections of unequal counts."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import places
from lit_reduce.ops.similarity import exact


def outlier_count(scores: Tensor) -> Tensor:
    """Scores ``[B, N]`` above ``Q3 + 1.5 (Q3 - Q1)``, quartiles by linear interpolation: PruMerge (arXiv 2403.15388).

    Returns:
        ``[B]`` int64, possibly 0.
    """
    values = exact(scores)
    low, high = values.quantile(values.new_tensor([0.25, 0.75]), dim=-1)
    outside: Tensor = values > (high + 1.5 * (high - low))[:, None]
    return outside.sum(-1)


def mass_count(scores: Tensor, share: float) -> Tensor:
    """The fewest scores ``[B, N]``, not negative, that hold this share of their sum: ZipVL (arXiv 2410.08584), top-p.

    Returns:
        ``[B]`` int64, at least 1.
    """
    mass = exact(scores).double().sort(dim=-1, descending=True).values.cumsum(-1)
    return ((mass < share * mass[:, -1:]).sum(-1) + 1).clamp_max(scores.shape[-1])


def elbow_count(scores: Tensor) -> Tensor:
    """Scores ``[B, N]`` up to the elbow: where the sorted curve is farthest below its chord (CoreMatching).

    Returns:
        ``[B]`` int64, at least 1; of equal distances the earlier.
    """
    curve = exact(scores).sort(dim=-1, descending=True).values
    line = torch.linspace(0, 1, curve.shape[-1], device=curve.device, dtype=curve.dtype)
    chord = curve[:, :1] + (curve[:, -1:] - curve[:, :1]) * line
    return (chord - curve).argmax(-1) + 1


def ragged_places(chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the true entries of ``chosen`` ``[B, N]``, at most ``k`` in a row, padded to ``k``.

    Returns:
        Anchors ``[B, k]``, ascending, and which are real ``[B, k]``; the padding trails and repeats the last token.
    """
    valid = torch.arange(k, device=chosen.device) < chosen.sum(-1, keepdim=True)
    return places(chosen, k).masked_fill(~valid, chosen.shape[-1] - 1), valid
