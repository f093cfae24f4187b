"""Closed-form linear regression from accumulated sums: ridge and reduced-rank."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Map(NamedTuple):
    """Linear map in factored form: ``y = x @ down @ up + bias``.

    Attributes:
        down: ``[D, r]``.
        up: ``[r, S]``.
        bias: ``[S]``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions ``[n, S]`` for ``[n, D]``."""
        return x @ self.down @ self.up + self.bias


@dataclass
class Moments:
    """Sufficient statistics of a linear regression, summed in float64 over batches.

    Attributes:
        count: Number of samples.
        x: ``[D]``, sum of the inputs.
        y: ``[S]``, sum of the targets.
        xx: ``[D, D]``, sum of outer products of inputs.
        xy: ``[D, S]``, sum of outer products of inputs and targets.
        yy: ``[S]``, sums of squares of the targets.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """The statistics of inputs ``[n, D]`` and targets ``[n, S]``."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def columns(self, chosen: slice) -> "Moments":
        """The statistics of the same samples for a slice of the targets."""
        return Moments(self.count, self.x, self.y[chosen], self.xx, self.xy[:, chosen], self.yy[chosen])

    @property
    def spread(self) -> Tensor:
        """Variances of the targets ``[S]``."""
        return (self.yy / self.count - (self.y / self.count).square()).clamp_min(0)


def fit(moments: Moments, rank: int | None = None, ridge: float = 1e-4, weight: Tensor | None = None) -> Map:
    """Least-squares map of at most ``rank``: ridge and reduced-rank regression on centred samples.

    With G the covariance of the inputs including the ridge, ``G = L L^T``, and W the full-rank solution, the best map
    of rank r projects W onto the first r right singular vectors of ``L^T W`` (Izenman, 1975).

    Args:
        moments: Statistics of the samples.
        rank: None for full rank.
        ridge: Ridge in units of the mean variance of the inputs.
        weight: ``[S]``, weight of each target's error in the choice of the ``rank`` directions.
    """
    n = moments.count
    mean_x, mean_y = moments.x / n, moments.y / n
    gram = moments.xx / n - mean_x[:, None] * mean_x
    gram = gram + ridge * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    lower = torch.linalg.cholesky(gram)
    scale = torch.ones_like(mean_y) if weight is None else weight.double().sqrt()
    whole = torch.cholesky_solve(moments.xy / n - mean_x[:, None] * mean_y, lower) * scale
    rank = min(whole.shape) if rank is None else min(rank, *whole.shape)
    seen = lower.T @ whole
    # Left singular vectors from a D x D matrix, independent of the number of targets.
    left = torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :rank]
    down = torch.linalg.solve_triangular(lower.T, left, upper=True)
    up = left.T @ seen / scale
    return Map(down, up, mean_y - mean_x @ down @ up)


def explained(mapped: Tensor, target: Tensor) -> float:
    """R^2 of predictions ``[n, S]``: share of the variance of the targets that they explain, over all S together."""
    left = (target - mapped).double().square().sum()
    return float(1 - left / (target - target.mean(0)).double().square().sum().clamp_min(1e-30))
