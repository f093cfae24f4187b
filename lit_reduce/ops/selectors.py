"""Selectors: which K of N tokens stay. All are batched, deterministic and return ascending indices."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reduce.ops.cells import cells


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores in raster order; of equal scores the lower index wins.

    ``torch.topk`` leaves the choice between equal scores to the device; a stable sort does not. NaN counts as lowest.

    Args:
        scores: ``[B, N]``.
        k: Between 1 and N.

    Returns:
        ``[B, k]`` int64, ascending.
    """
    ranked = scores.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :k].sort(dim=-1).values


def farthest_point(features: Tensor, k: int) -> Tensor:
    """The ``k`` most mutually different tokens, greedily: maximise the smallest cosine distance to those chosen.

    DivPrune (arXiv 2503.02175), its max-min diversity problem: the first token is the one farthest from its nearest
    neighbour, each next one the farthest from all chosen. Ours never chooses a token twice, even among duplicates.

    Args:
        features: ``[B, N, D]``.
        k: Between 1 and N.

    Returns:
        ``[B, k]`` int64, ascending.
    """
    unit = F.normalize(features.detach().float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    rows = torch.arange(len(unit), device=unit.device)
    nearest = distance.diagonal_scatter(torch.full_like(unit[..., 0], torch.inf), dim1=1, dim2=2).amin(-1)
    chosen = torch.zeros_like(nearest, dtype=torch.bool)
    for step in range(k):
        pick = nearest.masked_fill(chosen, -torch.inf).argmax(-1)
        chosen[rows, pick] = True
        # The neighbour distances served the first pick only; from here on what counts is the distance to the chosen.
        nearest = distance[rows, pick] if step == 0 else torch.minimum(nearest, distance[rows, pick])
    return chosen.nonzero()[:, 1].view(len(unit), k)


def uniform_grid(grid: tuple[int, int, int], count: int, k: int) -> Tensor:
    """Centres of ``k`` even cells of the grid, see `cells`.

    Args:
        grid: Frames, rows, columns.
        count: Tokens of an image, N.
        k: Between 1 and N.

    Returns:
        ``[k]`` int64, ascending.
    """
    return cells(grid, count, k)[0]
