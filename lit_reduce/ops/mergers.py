"""Mergers: make K new tokens from N."""

import torch
from torch import Tensor

from lit_reduce.ops.cells import cells
from lit_reduce.ops.similarity import cosine, gather_tokens, to_float32, unit


def average_pool(features: Tensor, grid: tuple[int, int, int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Average pooling over exactly ``k`` even cells of the grid, see `cells`.

    Args:
        features: ``[B, N, D]``.
        grid: Frames, rows, columns.
        k: Between 1 and N.

    Returns:
        Means ``[B, k, D]`` in the dtype of the features, the index of the token at each cell's centre ``[k]``, and the
        cell of each token ``[N]``.
    """
    batch, count, width = features.shape
    kept_indices, assignment = (part.to(features.device) for part in cells(grid, count, k))
    sizes = assignment.bincount(minlength=k).view(1, -1, 1)
    # Summed in float32: a half-precision sum over a large cell would lose the small differences.
    sums = features.new_zeros(batch, k, width, dtype=features.float().dtype).index_add(1, assignment, features.float())
    return (sums / sizes).to(features.dtype), kept_indices, assignment


def nearest(metric: Tensor, kept_indices: Tensor) -> Tensor:
    """Assignment of each token to the most similar kept token, by cosine.

    A kept token is assigned to itself; of equally similar ones the lower index wins.

    Args:
        metric: ``[B, N, D]``.
        kept_indices: ``[B, K]``.

    Returns:
        ``[B, N]`` int64 below K.
    """
    assignment = cosine(gather_tokens(metric, kept_indices), metric).argmax(1)
    return assignment.scatter(
        1, kept_indices, torch.arange(kept_indices.shape[1], device=kept_indices.device).expand_as(kept_indices)
    )


def to_assignment(kept_indices: Tensor, target: Tensor) -> Tensor:
    """Convert the token that each token is merged into to its number among the K kept tokens.

    Args:
        kept_indices: ``[B, K]``.
        target: ``[B, N]``, index of the kept token that each token is merged into; a kept token's own index, -1 for
            none.

    Returns:
        ``[B, N]`` int64 below K, -1 for none.
    """
    number = torch.full_like(target, -1)
    number = number.scatter(
        1, kept_indices, torch.arange(kept_indices.shape[1], device=kept_indices.device).expand_as(kept_indices)
    )
    return number.gather(1, target.clamp_min(0)).masked_fill(target < 0, -1)


def merge_mean(features: Tensor, assignment: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean of the tokens that are assigned to each of ``k`` new tokens.

    With token sizes as weights this is the merge of ToMe (arXiv 2210.09461).

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` below ``k``, -1 for tokens that are dropped.
        k: Number of new tokens.
        weight: ``[B, N]``; None for ones.

    Returns:
        Means ``[B, k, D]`` in the dtype of the features, and the summed weights ``[B, k]``.
    """
    x = to_float32(features)
    weight = torch.ones_like(x[..., 0]) if weight is None else to_float32(weight)
    mass = _group_sum(weight[..., None], assignment, k)[..., 0]
    return (_group_sum(x * weight[..., None], assignment, k) / mass.clamp_min(1e-12)[..., None]).to(
        features.dtype
    ), mass


def merge_sum(features: Tensor, assignment: Tensor, kept_indices: Tensor) -> Tensor:
    """Each kept token plus the mean of the other tokens assigned to it.

    The result is up to twice as long as a token; `merge_mean` keeps the length.

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` below K, -1 for none.
        kept_indices: ``[B, K]``.

    Returns:
        ``[B, K, D]``.

    Source: contextual tokens in the official code of VisionZip, arXiv 2412.04467.
    """
    others = assignment.scatter(1, kept_indices, -1)
    mean, _ = merge_mean(features, others, kept_indices.shape[1])
    return gather_tokens(features, kept_indices) + mean


def merge_attention(
    features: Tensor, metric: Tensor, attention: Tensor, kept_indices: Tensor, neighbours: int
) -> Tensor:
    """Each kept token plus the attention-weighted sum of its nearest other tokens.

    The weights are not normalised. Neighbours may themselves be kept tokens and may serve several of them.

    Args:
        features: ``[B, N, D]``.
        metric: ``[B, N, Dk]``, compared by cosine.
        attention: ``[B, N]``.
        kept_indices: ``[B, K]``.
        neighbours: Number of neighbours; 32 in the paper.

    Returns:
        ``[B, K, D]``.

    Source: LLaVA-PruMerge, arXiv 2403.15388.
    """
    similarity = cosine(gather_tokens(metric, kept_indices), metric).scatter(2, kept_indices[..., None], -torch.inf)
    near = similarity.sort(dim=-1, descending=True, stable=True).indices[..., : min(neighbours, metric.shape[1] - 1)]
    weight = torch.zeros_like(similarity).scatter(2, near, 1) * to_float32(attention)[:, None]
    return (to_float32(gather_tokens(features, kept_indices)) + weight @ to_float32(features)).to(features.dtype)


def windows(grid: tuple[int, int, int], size: int) -> Tensor:
    """Number of the square window that each token of the grid lies in ``[N]``; -1 outside the last whole window."""
    frames, rows, columns = grid
    down, across = rows // size, columns // size
    row, column = torch.arange(rows) // size, torch.arange(columns) // size
    assignment = (row[:, None] * across + column).masked_fill((row >= down)[:, None] | (column >= across), -1)
    shifts = torch.arange(frames)[:, None, None] * (down * across)
    return torch.where(assignment >= 0, assignment + shifts, -1).flatten()


def mean_pairwise_cosine(features: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Mean cosine over the pairs of tokens in each of ``k`` groups ``[B, k]``; 1 for a group of one token.

    Computed by the identity ``|sum of unit vectors|^2 = n + sum over pairs``. MustDrop (arXiv 2411.10803) merges
    windows above 0.8.

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` or ``[N]``, the group of each token, below ``k``; -1 for none.
        k: Number of groups.
    """
    units, groups = unit(features), assignment.expand(len(features), -1)
    size = _group_sum(torch.ones_like(units[..., :1]), groups, k)[..., 0]
    pairs = _group_sum(units, groups, k).square().sum(-1) - size
    return torch.where(size > 1, pairs / (size * (size - 1)).clamp_min(1), 1.0)


def _group_sum(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum ``x`` ``[B, N, D]`` over the tokens of each of ``k`` groups ``[B, k, D]``; group -1 is dropped."""
    batch = len(x)
    # Rows added to one matrix: several times as fast as a scatter or a product with one-hot rows.
    index = torch.where(assignment < 0, k, assignment) + (k + 1) * torch.arange(batch, device=x.device)[:, None]
    sums = x.new_zeros(batch * (k + 1), x.shape[2]).index_add(0, index.flatten(), x.flatten(0, 1))
    return sums.view(batch, k + 1, -1)[:, :k]
