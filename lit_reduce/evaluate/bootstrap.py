"""Percentile bootstrap intervals of a mean and of a ratio of means."""

from collections.abc import Callable

import torch
from torch import Tensor


def interval(values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    Args:
        values: ``[n]`` scores, one per independent item; for a paired difference give the differences.
        level: How often the interval is to hold the true mean.
        resamples: How many times the items are drawn anew, with replacement.
        seed: The draw is reproducible.

    Returns:
        The lower and upper end.

    Raises:
        ValueError: ``values`` is empty or ``level`` lies outside (0, 1).
    """
    return _interval(values[:, None], lambda means: means[:, 0], level, resamples, seed)


def ratio_interval(
    values: Tensor, reference: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``mean(values) / mean(reference)``, both scored on the same items.

    Items are drawn in pairs, so what makes an item hard for both does not widen the interval. A draw in which the
    reference scores 0 is left out.

    Args:
        values: ``[n]`` scores.
        reference: ``[n]`` scores of the same items in the same order.
        level: As in :func:`interval`.
        resamples: As in :func:`interval`.
        seed: As in :func:`interval`.

    Raises:
        ValueError: As :func:`interval`, or the two differ in length, or the reference scores 0 in every draw.
    """
    if values.shape != reference.shape:
        raise ValueError("values and reference must score the same items")

    def ratio(means: Tensor) -> Tensor:
        means = means[means[:, 1] != 0]
        if not len(means):
            raise ValueError("the reference scores 0, so nothing can be relative to it")
        return means[:, 0] / means[:, 1]

    return _interval(torch.stack([values, reference], 1), ratio, level, resamples, seed)


def _interval(
    items: Tensor, statistic: Callable[[Tensor], Tensor], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Interval of a statistic of the column means of ``items`` ``[n, m]``."""
    if items.ndim != 2 or len(items) == 0:
        raise ValueError("values must be one row of at least one score")
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    items = items.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, items.shape[1], dtype=torch.float64)
    for index in range(resamples):  # one row at a time: a [resamples, n] index would be large for big test sets
        means[index] = items[torch.randint(len(items), (len(items),), generator=generator)].mean(0)
    tail = (1 - level) / 2
    low, high = torch.quantile(statistic(means), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
