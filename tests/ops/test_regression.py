"""Regression from moments against numpy's solver on the samples themselves, and against gradient descent."""

import numpy as np
import torch

from lit_reduce.ops.regression import Moments, explained, fit


def samples(n: int = 200, d: int = 7, s: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, d) + 2
    y = x @ torch.randn(d, s, generator=g, dtype=torch.float64) + torch.randn(n, s, generator=g, dtype=torch.float64)
    return x, y - 5


def test_full_rank_is_least_squares_however_the_samples_arrive() -> None:
    x, y = samples()
    moments = Moments.of(x[:50], y[:50]) + Moments.of(x[50:], y[50:])
    found = fit(moments, ridge=0)
    inputs = np.c_[x.numpy(), np.ones(len(x))]
    wanted = torch.from_numpy(inputs @ np.linalg.lstsq(inputs, y.numpy(), rcond=None)[0])
    torch.testing.assert_close(found(x), wanted)
    assert abs(explained(found(x), y) - (1 - ((found(x) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())) < 1e-12
    torch.testing.assert_close(moments.spread, y.var(0, correction=0))
    part = fit(moments.columns(slice(2, 5)), ridge=0)
    torch.testing.assert_close(part(x), found(x)[:, 2:5])


def test_ridge_adds_its_rows() -> None:
    """Ridge is least squares with further samples: the mean input in each direction, and nothing to predict."""
    x, y = samples()
    centred, target = x - x.mean(0), y - y.mean(0)
    each = 0.3 * centred.square().mean()
    more = (each * len(x)).sqrt() * torch.eye(7, dtype=x.dtype)
    rows = np.r_[centred.numpy(), more.numpy()], np.r_[target.numpy(), np.zeros((7, 11))]
    wanted = torch.from_numpy(np.linalg.lstsq(*rows, rcond=None)[0])
    torch.testing.assert_close(fit(Moments.of(x, y), ridge=0.3)(x), centred @ wanted + y.mean(0))


def test_no_descent_finds_a_better_map_of_low_rank() -> None:
    x, y = samples()
    weight = torch.linspace(0.2, 4, 11, dtype=torch.float64)
    found = fit(Moments.of(x, y), rank=2, ridge=0, weight=weight)
    assert found.down.shape == (7, 2)
    best = ((found(x) - y).square() * weight).mean()
    assert ((fit(Moments.of(x, y), rank=2, ridge=0)(x) - y).square() * weight).mean() > 1.01 * best
    centred, target = x - x.mean(0), y - y.mean(0)
    torch.manual_seed(0)
    down, up = torch.randn(7, 2).double().requires_grad_(), torch.randn(2, 11).double().requires_grad_()
    optimizer = torch.optim.LBFGS([down, up], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = ((centred @ down @ up - target).square() * weight).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert float(best) - 1e-9 < float(loss()) < 1.001 * float(best)
