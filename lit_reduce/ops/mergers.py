"""Mergers: how N tokens become K new ones."""

import torch
from torch import Tensor

from lit_reduce.ops.cells import cells
from lit_reduce.ops.similarity import cosine, gather_tokens, to_float32


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
    kept_indices, assignment = (part.to(features.device) for part in cells(grid, count, k))
    sizes = assignment.bincount(minlength=k).view(1, -1, 1)
    # Summed in float32: a half-precision sum over a large cell would lose the small differences.
    sums = features.new_zeros(batch, k, width, dtype=features.float().dtype).index_add(1, assignment, features.float())
    return (sums / sizes).to(features.dtype), kept_indices, assignment


def nearest(metric: Tensor, kept_indices: Tensor) -> Tensor:
    """Which anchor each token is most similar to, by cosine; an anchor goes to itself, ties to the lower one.

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
    """Which of K tokens each original one went into, from the token that took it.

    Args:
        kept_indices: ``[B, K]``.
        target: ``[B, N]``, for each token the anchor that it went into, itself for anchors; -1 for none.

    Returns:
        ``[B, N]`` int64 below K, -1 for none.
    """
    number = torch.full_like(target, -1)
    number = number.scatter(
        1, kept_indices, torch.arange(kept_indices.shape[1], device=kept_indices.device).expand_as(kept_indices)
    )
    return number.gather(1, target.clamp_min(0)).masked_fill(target < 0, -1)


def merge_mean(features: Tensor, assignment: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean of the tokens that share an assignment: with sizes as weights, ToMe's merge (arXiv 2210.09461).

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` below ``k``, -1 for tokens that are dropped.
        k: New tokens.
        weight: ``[B, N]``, ones when None.

    Returns:
        Means ``[B, k, D]`` in the dtype of the features, and the summed weights ``[B, k]``.
    """
    share = _shares(features, assignment, k)
    share = share if weight is None else share * to_float32(weight)[:, None]
    mass = share.sum(-1)
    return (share @ to_float32(features) / mass.clamp_min(1e-12)[..., None]).to(features.dtype), mass


def merge_sum(features: Tensor, assignment: Tensor, kept_indices: Tensor) -> Tensor:
    """Each anchor plus the mean of the other tokens it owns: VisionZip's contextual tokens (arXiv 2412.04467).

    The sum of two vectors, up to twice as long as a token, is what the official code does; `merge_mean` keeps the
    length.

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` below K, -1 for none.
        kept_indices: ``[B, K]``.

    Returns:
        ``[B, K, D]``.
    """
    others = assignment.scatter(1, kept_indices, -1)
    mean, _ = merge_mean(features, others, kept_indices.shape[1])
    return gather_tokens(features, kept_indices) + mean


def merge_attention(
    features: Tensor, metric: Tensor, attention: Tensor, kept_indices: Tensor, neighbours: int
) -> Tensor:
    """Each anchor plus its nearest other tokens times their attention: LLaVA-PruMerge (arXiv 2403.15388).

    Nothing is normalised; neighbours may be anchors themselves and serve several.

    Args:
        features: ``[B, N, D]``.
        metric: ``[B, N, Dk]`` that cosines are taken of.
        attention: ``[B, N]``.
        kept_indices: ``[B, K]``.
        neighbours: The paper's is 32.

    Returns:
        ``[B, K, D]``.
    """
    similarity = cosine(gather_tokens(metric, kept_indices), metric).scatter(2, kept_indices[..., None], -torch.inf)
    near = similarity.sort(dim=-1, descending=True, stable=True).indices[..., : min(neighbours, metric.shape[1] - 1)]
    weight = torch.zeros_like(similarity).scatter(2, near, 1) * to_float32(attention)[:, None]
    return (to_float32(gather_tokens(features, kept_indices)) + weight @ to_float32(features)).to(features.dtype)


def windows(grid: tuple[int, int, int], size: int) -> Tensor:
    """Which square window each token of the grid lies in ``[N]``, in raster order; -1 beyond the last whole one."""
    frames, rows, columns = grid
    down, across = rows // size, columns // size
    row, column = torch.arange(rows) // size, torch.arange(columns) // size
    assignment = (row[:, None] * across + column).masked_fill((row >= down)[:, None] | (column >= across), -1)
    shifts = torch.arange(frames)[:, None, None] * (down * across)
    return torch.where(assignment >= 0, assignment + shifts, -1).flatten()


def mean_pairwise_cosine(features: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Mean cosine of the pairs of tokens in each of ``k`` groups ``[B, k]``; a single token agrees fully.

    By the identity ``|sum of units|^2 = n + sum over pairs``; MustDrop (arXiv 2411.10803) merges windows above 0.8.

    Args:
        features: ``[B, N, D]``.
        assignment: ``[B, N]`` or ``[N]`` below ``k``, -1 for none.
        k: Groups.
    """
    units = torch.nn.functional.normalize(to_float32(features), dim=-1)
    share = _shares(features, assignment.expand(len(features), -1), k)
    size = share.sum(-1)
    pairs = (share @ units).square().sum(-1) - size
    return torch.where(size > 1, pairs / (size * (size - 1)).clamp_min(1), 1.0)


def _shares(features: Tensor, assignment: Tensor, k: int) -> Tensor:
    """``[B, k, N]``, one where the token goes."""
    return (assignment[:, None] == torch.arange(k, device=assignment.device)[:, None]).to(
        to_float32(features[:1, :1]).dtype
    )
