"""Thresholds instead of ranks: how many tokens stay follows from the scores, and thresholds can be learned."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import to_float32

NONE = 1e-6  # of a score that counts as nothing, where logarithms are taken


def max_normalize(scores: Tensor) -> Tensor:
    """Scores ``[B, N]`` as parts of the largest of each image; zero stays zero."""
    scores = to_float32(scores)
    return scores / scores.amax(-1, keepdim=True).clamp_min(1e-30)


def grid_scores(place: Tensor, grid: tuple[int, int, int], strides: tuple[int, ...] = (2, 3, 4, 6)) -> Tensor:
    """Spatial scores ``[B, N]``: the sparser the sparsest uniform grid that a token lies on, the higher.

    A grid of stride s keeps the rate ``R = 1 / s^2`` and scores ``1 - 3 R``; tokens on none of them, newline tokens
    among these, score 0. A threshold then chooses the density. One rate and the factor 3 are ATP-LLaVA's
    (arXiv 2412.00447, eq 5, as rebuilt by others); several rates are our reading of its dynamic sampling.

    Args:
        place: ``[B, N]``, raster index of each token in its image.
        grid: Frames, rows and columns.
        strides: Of the grids.
    """
    frames, rows, columns = grid
    row, column = place % (rows * columns) // columns, place % columns
    score = torch.zeros(place.shape, device=place.device)
    for stride in sorted(strides):
        inside = (row % stride == stride // 2) & (column % stride == stride // 2) & (place < frames * rows * columns)
        score = score.masked_fill(inside, 1 - 3 / stride**2).maximum(score)
    return score


def effective_share(scores: Tensor, weight: Tensor) -> Tensor:
    """On how many tokens scores rest, ``[B]`` in (0, 1]: the exponential of their entropy in parts of all tokens.

    1 where all score alike, 1 / N where one alone scores. Our reading of the pooling in ATP-LLaVA (arXiv 2412.00447,
    eq 6).

    Args:
        scores: ``[B, N]``, not negative.
        weight: ``[B, N]``, not negative; what weighs 0 is gone.
    """
    held = scores * weight
    part = held / held.sum(1, keepdim=True).clamp_min(1e-30)
    share: Tensor = (-(part * part.clamp_min(1e-30).log()).sum(1)).exp() / weight.sum(1).clamp_min(NONE)
    return share


def mass_threshold(scores: Tensor, weight: Tensor, mass: Tensor) -> Tensor:
    """The threshold ``[B]`` above which tokens of so much weight lie; it follows ``mass`` and scores without a jump.

    Half way between two neighbours for a mass that whole tokens make, straight in between, and below the largest score
    for any mass above 0.

    Args:
        scores: ``[B, N]``.
        weight: ``[B, N]``, not negative.
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
    """Another number of tokens of each image: those of the largest margins, in raster order.

    Args:
        margin: ``[B, N]``.
        counts: ``[B]``, each between 1 and N.

    Returns:
        Anchors ``[B, K]`` with K the largest count, and which are real ``[B, K]``: these come first.
    """
    most = int(counts.max())
    kept_indices = true_indices(ranks(margin) < counts[:, None], most)
    return kept_indices, torch.arange(most, device=margin.device) < counts[:, None]


def feasible_count(wanted: Tensor, left: Tensor, here: int, later: int) -> Tensor:
    """The count nearest to what is wanted with which a budget can still be spent, and will not be exceeded.

    Counts may not rise from stage to stage, so too few now would leave some of the budget over for good.

    Args:
        wanted: ``[B]``.
        left: ``[B]`` tokens, summed over layers, that are left to spend.
        here: Layers until the next stage.
        later: Layers behind it.
    """
    most = ((left - later) / here + 1e-4).floor()
    least = (left / (here + later) - 1e-4).ceil().minimum(most)
    return wanted.maximum(least).minimum(most).clamp(min=1).long()
