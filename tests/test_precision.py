"""The machine is asked which numbers it multiplies faster; a clear lead decides, not a feature's name."""

import itertools

import pytest
import torch

from lit_reduce import precision
from lit_reduce.precision import fast_in_bfloat16


@pytest.mark.parametrize(
    ("slower", "expected"), [(3.0, True), (1.1, False), (0.5, False)], ids=["clear lead", "noise", "slower"]
)
def test_a_clear_lead_of_bfloat16_decides(monkeypatch: pytest.MonkeyPatch, slower: float, expected: bool) -> None:
    clock = 0.0

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal clock
        clock += 1.0 if left.dtype == torch.bfloat16 else slower
        return left

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock)
    assert fast_in_bfloat16.__wrapped__(torch.device("cpu")) is expected


def test_one_slow_moment_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = 0.0, itertools.count()

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal clock
        clock += 100.0 if next(calls) < 3 else 1.0 if left.dtype == torch.float32 else 0.3
        return left

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock)
    assert fast_in_bfloat16.__wrapped__(torch.device("cpu"))


def test_devices_without_an_answer_stay_in_float32() -> None:
    assert not fast_in_bfloat16(torch.device("meta"))
