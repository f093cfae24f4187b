"""The parts that make times comparable."""

import pytest

from lit_reduce.benchmark.latency import Spread, alternate, spread


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="not enough"):
        spread([])


def test_runs_take_turns_and_keep_their_order():
    order = []
    found = alternate({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert order == list("ababab")
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}
