"""Linear regression from sums over samples, in closed form: ridge, and the best map of a given rank."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Map(NamedTuple):
    """``y = x @ down @ up + bias``.

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
    """What regression needs to know of all samples: sums in float64, to which batches are added.

    Attributes:
        count: Samples.
        x: ``[D]``, their sum.
        y: ``[S]``.
        xx: ``[D, D]``.
        xy: ``[D, S]``.
        yy: ``[S]``, sums of squares.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """Of inputs ``[n, D]`` and targets ``[n, S]``."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def columns(self, chosen: slice) -> "Moments":
        """The same samples with some of the targets."""
        return Moments(self.count, self.x, self.y[chosen], self.xx, self.xy[:, chosen], self.yy[chosen])

    @property
    def spread(self) -> Tensor:
        """``[S]``, variances of the targets."""
        return (self.yy / self.count - (self.y / self.count).square()).clamp_min(0)


def fit(moments: Moments, rank: int | None = None, ridge: float = 1e-4, weight: Tensor | None = None) -> Map:
    """The map of least squares, of at most ``rank``: reduced-rank regression on centred samples.

    With G the inputs' covariance, ridge included, G = L L^T and W the full solution, the best map of rank r projects W
    on the r first right singular vectors of L^T W (Izenman, 1975).

    Args:
        moments: Of the samples.
        rank: None for full rank.
        ridge: In units of the inputs' mean variance.
        weight: ``[S]``, how much the error of each target counts in the choice of the ``rank`` directions.
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
    # Left singular vectors are those of a D x D matrix, however many targets there are.
    left = torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :rank]
    down = torch.linalg.solve_triangular(lower.T, left, upper=True)
    up = left.T @ seen / scale
    return Map(down, up, mean_y - mean_x @ down @ up)


def explained(mapped: Tensor, target: Tensor) -> float:
    """R^2 of predictions ``[n, S]``: the share of the targets' variance, over all S together, that they explain."""
    left = (target - mapped).double().square().sum()
    return float(1 - left / (target - target.mean(0)).double().square().sum().clamp_min(1e-30))
