"""Selection by thresholds, where the number of kept tokens follows from the scores."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import to_float32

NONE = 1e-6  # lower bound of scores under a logarithm


def max_normalize(scores: Tensor) -> Tensor:
    """Divide scores ``[B, N]`` by the largest one of each image; zero stays zero."""
    scores = to_float32(scores)
    return scores / scores.amax(-1, keepdim=True).clamp_min(1e-30)


def grid_scores(place: Tensor, grid: tuple[int, int, int], strides: tuple[int, ...] = (2, 3, 4, 6)) -> Tensor:
    """Spatial scores ``[B, N]``: higher for tokens that lie on a sparser uniform grid.

    A grid of stride s keeps the ratio ``R = 1 / s^2`` of the tokens and gives them the score ``1 - 3 R``; a token on
    several grids gets the highest score, tokens on none (newline tokens among these) get 0. A threshold on the score
    then selects the density. One ratio and the factor 3 are from ATP-LLaVA (arXiv 2412.00447, eq. 5, as reconstructed
    by others); several ratios are our reading of its dynamic sampling.

    Args:
        place: ``[B, N]``, raster index of each token in its image.
        grid: Frames, rows and columns.
        strides: Strides of the grids.
    """
    frames, rows, columns = grid
    row, column = place % (rows * columns) // columns, place % columns
    score = torch.zeros(place.shape, device=place.device)
    for stride in sorted(strides):
        inside = (row % stride == stride // 2) & (column % stride == stride // 2) & (place < frames * rows * columns)
        score = score.masked_fill(inside, 1 - 3 / stride**2).maximum(score)
    return score


def effective_share(scores: Tensor, weight: Tensor) -> Tensor:
    """Effective share of the tokens over which scores are spread ``[B]``: exp(entropy) / N, in (0, 1].

    1 if all scores are equal, 1 / N if a single one is non-zero. Our reading of the pooling in ATP-LLaVA (arXiv
    2412.00447, eq. 6).

    Args:
        scores: ``[B, N]``, non-negative.
        weight: ``[B, N]``, non-negative; tokens of weight 0 are excluded.
    """
    held = scores * weight
    part = held / held.sum(1, keepdim=True).clamp_min(1e-30)
    share: Tensor = (-(part * part.clamp_min(1e-30).log()).sum(1)).exp() / weight.sum(1).clamp_min(NONE)
    return share


def mass_threshold(scores: Tensor, weight: Tensor, mass: Tensor) -> Tensor:
    """Threshold ``[B]`` above which tokens of a given total weight lie; differentiable in ``mass`` and ``scores``.

    It lies midway between two neighbouring scores if whole tokens make up the mass, is interpolated linearly in
    between, and lies below the largest score for any positive mass.

    Args:
        scores: ``[B, N]``.
        weight: ``[B, N]``, non-negative.
        mass: ``[B]``.
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    total = torch.nn.functional.pad(weight.gather(1, order).cumsum(1), (1, 0)).detach()
    between = (ranked[:, :-1] + ranked[:, 1:]) / 2
    knots = torch.cat([ranked[:, :1], between, ranked[:, -1:] - 1], 1)
    after = torch.searchsorted(total, mass.detach()[:, None].to(total)).clamp(1, scores.shape[1])
    (low, high), (below, above) = ((x.gather(1, after - 1), x.gather(1, after)) for x in (total, knots))
    share = ((mass[:, None] - low) / (high - low).clamp_min(NONE)).clamp(0, 1)
    found: Tensor = (below + share * (above - below))[:, 0]
    return found


def ragged_topk(margin: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k with a different number of tokens per image, padded.

    Args:
        margin: ``[B, N]``, scores.
        counts: ``[B]``, each between 1 and N.

    Returns:
        Indices ``[B, K]``, where K is the largest count, and a mask ``[B, K]`` of the valid ones. Valid indices come
        first and ascend.
    """
    most = int(counts.max())
    kept_indices = true_indices(ranks(margin) < counts[:, None], most)
    return kept_indices, torch.arange(most, device=margin.device) < counts[:, None]


def feasible_count(wanted: Tensor, left: Tensor, here: int, later: int) -> Tensor:
    """The count nearest to ``wanted`` with which the budget is spent and not exceeded.

    Counts may not rise from stage to stage, so a count that is too small now would leave part of the budget unused.

    Args:
        wanted: ``[B]``.
        left: ``[B]``, tokens left to spend, summed over layers.
        here: Layers until the next stage.
        later: Layers after that.
    """
    most = ((left - later) / here + 1e-4).floor()
    least = (left / (here + later) - 1e-4).ceil().minimum(most)
    return wanted.maximum(least).minimum(most).clamp(min=1).long()
