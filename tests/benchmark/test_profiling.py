"""Memory and FLOPs of one call against sizes known beforehand."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_reduce.benchmark.profiling import ModuleFlops, peak_bytes

CPU = torch.device("cpu")


def test_peak_is_the_most_that_lived_at_a_time():
    kept = []

    def run():
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(2000, dtype=torch.float64)
        del first
        kept.append(torch.empty(500, dtype=torch.float64))
        del second

    assert peak_bytes(run, CPU) == 24_000
    assert peak_bytes(lambda: None, CPU) == 0


def test_peak_counts_only_what_comes_on_top():
    held = torch.empty(10_000)
    assert peak_bytes(held.clone, CPU) == held.nbytes


def test_flops_of_all_calls_of_one_module_and_nothing_else():
    inner, outer = nn.Linear(8, 4, bias=False), nn.Linear(4, 2)
    with ModuleFlops(inner) as flops:
        for _ in range(2):
            outer(inner(torch.ones(3, 8)))
    outer(inner(torch.ones(3, 8)))
    assert flops.total == 2 * (2 * 3 * 8 * 4)
    with ModuleFlops(None) as none:
        outer(torch.ones(3, 4))
    assert none.total == 0


def test_flops_of_later_calls_are_told_apart():
    inner = nn.Linear(8, 4, bias=False)
    model = nn.Sequential(inner)
    with ModuleFlops(inner, model) as flops:
        inner(torch.ones(1, 8))  # before the model's own pass, as a reducer at the projector
        for rows in (3, 2, 1):
            model(torch.ones(rows, 8))
    assert flops.total == 2 * 8 * 4 * (1 + 3)
    assert flops.later == 2 * 8 * 4 * (2 + 1)


def test_an_error_inside_the_module_ends_the_count():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError(x.sum())

    with pytest.raises(ValueError, match="3"), ModuleFlops(Fails()) as flops:
        flops.module(torch.ones(3))
    assert not _get_current_dispatch_mode_stack()
