"""Budget rules: the papers' own numbers, and fairness by a loop that hands out one token at a time."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.budgets import (
    contextual_count,
    even_shares,
    geometric_schedule,
    largest_remainder,
    recycled_split,
)


@pytest.mark.parametrize(("k", "few"), [(192, 30), (128, 20), (64, 10), (32, 5), (2, 1), (1, 0)])
def test_visionzips_contextual_part(k, few):
    assert contextual_count(k) == few


@pytest.mark.parametrize(
    ("tokens", "kept", "left"),
    [
        (576, 300, 309),
        (309, 200, 204),
        (204, 110, 113),  # 192
        (576, 303, 312),
        (312, 110, 117),
        (117, 36, 39),  # 128
        (576, 66, 82),
        (82, 30, 32),
        (32, 17, 18),  # 64
    ],
)
def test_sparsevlms_recycled_clusters_join_the_kept(tokens, kept, left):
    assert recycled_split(tokens, left)[0] == kept
    assert recycled_split(tokens, left)[2] == left - kept


@given(st.integers(2, 60), st.data())
def test_any_count_can_be_split(tokens, data):
    count = data.draw(st.integers(1, tokens - 1))
    kept, recycled, clusters = recycled_split(tokens, count)
    assert kept + clusters == count
    assert clusters <= recycled <= tokens - kept


def test_geometric_schedule_halves_like_pyramiddrop():
    assert geometric_schedule([0.25, 0.5, 0.75], 32, 576, 72) == {8: 288, 16: 144, 24: 72}
    assert geometric_schedule([0.0625, 0.1875, 0.46875], 32, 576, 576) == {2: 576, 6: 576, 15: 576}
    assert geometric_schedule([0.0625, 0.1875, 0.46875], 4, 100, 25) == {1: 50, 2: 25}


@given(st.integers(0, 50), st.integers(1, 9))
def test_even_shares(total, parts):
    shares = even_shares(total, parts)
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def shares_by_loop(weights: list[int], total: int, caps: list[int]) -> list[Fraction]:
    """Exact shares: split in proportion, close what is full, split what is left again."""
    share = [Fraction(0)] * len(caps)
    while True:
        open_ = [i for i in range(len(caps)) if share[i] < caps[i]]
        left = total - sum(share)
        if not left or not open_:
            return share
        mass = sum(weights[i] for i in open_)
        for i in open_:
            part = left * (Fraction(weights[i], mass) if mass else Fraction(1, len(open_)))
            share[i] = min(Fraction(caps[i]), share[i] + part)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=6), st.data())
def test_largest_remainder_rounds_the_exact_shares(parts, data):
    weights, caps = [w for w, _ in parts], [c for _, c in parts]
    total = data.draw(st.integers(0, sum(caps)))
    got = largest_remainder(torch.tensor([weights], dtype=torch.float32), total, caps)[0].tolist()
    assert sum(got) == total
    exact = shares_by_loop(weights, total, caps)
    for count, cap, share in zip(got, caps, exact, strict=True):
        assert 0 <= count <= cap
        assert share.__floor__() <= count <= share.__ceil__()
    lost = [share - share.__floor__() for share in exact]
    risen = [lost[i] for i in range(len(got)) if got[i] > exact[i].__floor__()]
    fallen = [lost[i] for i in range(len(got)) if got[i] == exact[i].__floor__() and lost[i]]
    assert not risen or not fallen or min(risen) >= max(fallen) - Fraction(1, 10**6)


def test_equal_remainders_serve_the_lower_index_and_rows_do_not_mix():
    got = largest_remainder(torch.tensor([[1.0, 1, 1], [0, 0, 0], [5, 0, 0]]), 4, [3, 3, 3])
    assert got.tolist() == [[2, 1, 1], [2, 1, 1], [3, 1, 0]]


def test_too_much_for_the_caps_is_refused():
    with pytest.raises(ValueError, match="cannot share 5"):
        largest_remainder(torch.ones(1, 2), 5, [2, 2])
