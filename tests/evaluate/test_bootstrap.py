"""Bootstrap intervals against the normal theory of a mean."""

import math

import pytest
import torch

from lit_reduce.evaluate.bootstrap import interval, ratio_interval


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_agrees_with_the_normal_interval_of_a_share(share: float) -> None:
    n = 1000
    values = torch.zeros(n)
    values[: int(n * share)] = 1
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    low, high = interval(values)
    assert low == pytest.approx(share - half, abs=0.15 * half)
    assert high == pytest.approx(share + half, abs=0.15 * half)


def test_holds_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    held = 0
    for trial in range(200):
        low, high = interval(torch.randn(60, generator=generator), level=0.8, resamples=200, seed=trial)
        held += low <= 0 <= high
    assert 0.7 < held / 200 < 0.9


def test_reproducible_and_certain_when_all_agree() -> None:
    values = torch.rand(50)
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)
    assert interval(torch.ones(7)) == (1.0, 1.0)


def test_refuses_nothing_and_bad_levels() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval(torch.empty(0))
    with pytest.raises(ValueError, match="level"):
        interval(torch.ones(3), level=95)


def test_a_ratio_is_drawn_in_pairs() -> None:
    """Against the delta method: the variance of a ratio of means of correlated scores."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    reference = (torch.rand(n, generator=generator) < 0.7).double()
    values = reference * (torch.rand(n, generator=generator) < 0.9)  # right only where the reference is: correlated
    share = float(values.mean() / reference.mean())
    half = 1.96 * float((values - share * reference).std()) / float(reference.mean()) / math.sqrt(n)
    low, high = ratio_interval(values, reference)
    assert low == pytest.approx(share - half, abs=0.15 * half)
    assert high == pytest.approx(share + half, abs=0.15 * half)
    assert ratio_interval(reference, reference) == (1.0, 1.0)


def test_a_ratio_needs_pairs_and_something_to_relate_to() -> None:
    with pytest.raises(ValueError, match="same items"):
        ratio_interval(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="scores 0"):
        ratio_interval(torch.ones(3), torch.zeros(3))
    low, high = ratio_interval(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))  # some draws hold only the second
    assert (low, high) == (1.0, 2.0)
