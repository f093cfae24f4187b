"""Counts that follow from the scores themselves, image by image, and selections of unequal counts."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import true_indices
from lit_reduce.ops.similarity import to_float32


def outlier_count(scores: Tensor) -> Tensor:
    """Scores ``[B, N]`` above ``Q3 + 1.5 (Q3 - Q1)``, quartiles by linear interpolation: PruMerge (arXiv 2403.15388).

    Returns:
        ``[B]`` int64, possibly 0.
    """
    values = to_float32(scores)
    low, high = values.quantile(values.new_tensor([0.25, 0.75]), dim=-1)
    outside: Tensor = values > (high + 1.5 * (high - low))[:, None]
    return outside.sum(-1)


def ragged_indices(chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the true entries of ``chosen`` ``[B, N]``, at most ``k`` in a row, padded to ``k``.

    Returns:
        Anchors ``[B, k]``, ascending, and which are real ``[B, k]``; the padding trails and repeats the last token.
    """
    valid = torch.arange(k, device=chosen.device) < chosen.sum(-1, keepdim=True)
    return true_indices(chosen, k).masked_fill(~valid, chosen.shape[-1] - 1), valid
