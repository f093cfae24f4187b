"""Mergers: how N tokens become K new ones."""

from torch import Tensor

from lit_reduce.ops.cells import cells


def average_pool(features: Tensor, grid: tuple[int, int, int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of each of exactly ``k`` even cells of the grid, see `cells`.

    Args:
        features: ``[B, N, D]``.
        grid: Frames, rows, columns.
        k: Between 1 and N.

    Returns:
        Means ``[B, k, D]`` in the dtype of the features, the token at each cell's centre ``[k]``, and the cell of
        each token ``[N]``.
    """
    batch, count, width = features.shape
    anchors, owner = (part.to(features.device) for part in cells(grid, count, k))
    sizes = owner.bincount(minlength=k).view(1, -1, 1)
    # Summed in float32: a half-precision sum over a large cell would lose the small differences.
    sums = features.new_zeros(batch, k, width, dtype=features.float().dtype).index_add(1, owner, features.float())
    return (sums / sizes).to(features.dtype), anchors, owner
