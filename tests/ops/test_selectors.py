"""Selectors against loops over plain Python numbers in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.selectors import topk_sorted, uniform_grid


def topk_by_loop(scores: list[float], k: int) -> list[int]:
    """Take the largest k times over; strict comparison leaves a tie with the first."""
    chosen: list[int] = []
    for _ in range(k):
        best = None
        for index, score in enumerate(scores):
            if index not in chosen and (best is None or score > scores[best]):
                best = index
        chosen.append(best)
    return sorted(chosen)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 7))
def test_topk_matches_the_loop_and_breaks_ties_by_raster_order(rows, k):
    got = topk_sorted(torch.tensor(rows, dtype=torch.float32), k)
    assert got.tolist() == [topk_by_loop(row, k) for row in rows]


def test_topk_breaks_ties_by_raster_order_where_an_unstable_sort_does_not():
    scores = torch.randint(0, 3, (2, 5000), generator=torch.Generator().manual_seed(0)).float()
    expected = [sorted(sorted(range(5000), key=lambda n: (-row[n], n))[:2100]) for row in scores.tolist()]
    assert topk_sorted(scores, 2100).tolist() == expected


def test_topk_keeps_nan_and_minus_infinity_for_last():
    assert topk_sorted(torch.tensor([[float("nan"), -1e30, 2.0, float("-inf")]]), 2).tolist() == [[1, 2]]


def test_uniform_grid_of_64_in_24_by_24_is_every_third_row_and_column():
    expected = [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert uniform_grid((1, 24, 24), 576, 64).tolist() == expected
