"""Token counts that depend on the scores of each image, and selections with a different count per image."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import true_indices
from lit_reduce.ops.similarity import to_float32


def outlier_count(scores: Tensor) -> Tensor:
    """Number of scores ``[B, N]`` above ``Q3 + 1.5 (Q3 - Q1)``, with linearly interpolated quartiles.

    Returns:
        ``[B]`` int64, possibly 0.

    Source: LLaVA-PruMerge, arXiv 2403.15388.
    """
    values = to_float32(scores)
    low, high = values.quantile(values.new_tensor([0.25, 0.75]), dim=-1)
    outside: Tensor = values > (high + 1.5 * (high - low))[:, None]
    return outside.sum(-1)


def ragged_indices(chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the true entries of ``chosen`` ``[B, N]``, at most ``k`` per row, padded to ``k``.

    Returns:
        Indices ``[B, k]``, ascending, and a mask ``[B, k]`` of the valid ones. Padding comes last and repeats the index
        N - 1.
    """
    valid = torch.arange(k, device=chosen.device) < chosen.sum(-1, keepdim=True)
    return true_indices(chosen, k).masked_fill(~valid, chosen.shape[-1] - 1), valid
