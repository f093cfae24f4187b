"""How sure a measured mean is: percentile bootstrap intervals."""

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
    if values.ndim != 1 or len(values) == 0:
        raise ValueError("values must be one row of at least one score")
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for index in range(resamples):  # one row at a time: a [resamples, n] index would be large for big test sets
        means[index] = values[torch.randint(len(values), (len(values),), generator=generator)].mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
