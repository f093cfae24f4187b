"""Selectors: which K of N tokens are kept. All are batched, deterministic and return ascending indices."""

import torch
from torch import Tensor

from lit_reduce.ops.cells import cells


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores in ascending order; of equal scores the lower index wins.

    ``torch.topk`` leaves the choice between equal scores to the device; a stable sort does not. NaN counts as the
    lowest score.

    Args:
        scores: ``[B, N]``.
        k: Between 1 and N.

    Returns:
        ``[B, k]`` int64, ascending.
    """
    ranked = scores.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :k].sort(dim=-1).values


def ranks(scores: Tensor) -> Tensor:
    """Descending rank of each score ``[..., N]``, from 0; of equal scores the lower index comes first."""
    order = scores.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)


def true_indices(chosen: Tensor, k: int) -> Tensor:
    """Indices ``[B, k]`` of the true entries of ``chosen`` ``[B, N]``, ascending; each row must have ``k`` of them."""
    return (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :k]


def row_topk(scores: Tensor, columns: int, k: int) -> Tensor:
    """Select whole rows of the grid by their summed score; the last row is filled with its best tokens.

    Args:
        scores: ``[B, N]``.
        columns: Tokens of a row; must divide N.
        k: Between 1 and N.

    Returns:
        ``[B, k]`` int64, ascending.

    Source: row strategy of FoPru, arXiv 2411.14164.
    """
    rows = scores.unflatten(1, (-1, columns))
    before = ranks(rows.sum(-1)) * columns
    return true_indices((before[..., None] + ranks(rows) < k).flatten(1), k)


def share_topk(scores: Tensor, part: Tensor, counts: Tensor) -> Tensor:
    """Top-k within each part of the tokens ``[B, N]`` bool, with a count for each part.

    Args:
        scores: ``[B, N]``.
        part: ``[N]`` int64, the part of each token, below P.
        counts: ``[B, P]``.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for number in range(counts.shape[1]):
        members = (part == number).nonzero()[:, 0]
        chosen[:, members] = ranks(scores[:, members]) < counts[:, number, None]
    return chosen


def thin_out(order: Tensor, similarity: Tensor, k: int, step: int = 8) -> Tensor:
    """Remove near-duplicates from a list of tokens until ``k`` remain.

    Each round splits the list into its even and odd positions and drops the ``step`` even ones that are most similar to
    an odd one. The next round takes the remaining even ones, most similar first, followed by the odd ones. Unlike the
    official code, lists of odd length are accepted.

    Args:
        order: ``[B, R]``, token indices, the most important first.
        similarity: ``[B, N, N]``.
        k: At most R.
        step: Tokens dropped per round.

    Returns:
        ``[B, k]`` int64, in the order of the last list.

    Source: VisPruner, arXiv 2412.01818.
    """
    while order.shape[1] > k:
        even, odd = order[:, ::2], order[:, 1::2]
        drop = min(step, order.shape[1] - k, even.shape[1])
        pairs = even[..., None] * similarity.shape[2] + odd[:, None]
        closest = similarity.flatten(1).gather(1, pairs.flatten(1)).view_as(pairs).amax(-1)
        ranked = even.gather(1, closest.sort(dim=-1, descending=True, stable=True).indices)
        order = torch.cat([ranked[:, drop:], odd], 1)
    return order


def least_similar(similarity: Tensor, kept: Tensor, k: int) -> Tensor:
    """For each pivot in turn, add the tokens least similar to it, until ``k`` tokens are selected.

    Args:
        similarity: ``[B, P, N]`` of each pivot with each token.
        kept: ``[B, N]`` bool, tokens that are selected from the start (pivots among them), equally many in each row.
        k: Number of tokens in all.

    Returns:
        ``[B, k]`` int64, ascending.

    Source: DART, arXiv 2502.11494.
    """
    pivots, extra = similarity.shape[1], k - int(kept[0].sum())
    for pivot in range(pivots):
        share = (pivot + 1) * extra // pivots - pivot * extra // pivots
        far = (-similarity[:, pivot]).masked_fill(kept, -torch.inf)
        kept = kept.scatter(1, topk_sorted(far, share), True)
    return true_indices(kept, k)


def uniform_grid(grid: tuple[int, int, int], count: int, k: int) -> Tensor:
    """Tokens at the centres of ``k`` even cells of the grid, see `cells`.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        ``[k]`` int64, ascending.
    """
    return cells(grid, count, k)[0]
