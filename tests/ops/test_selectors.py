"""Selectors against loops over plain Python numbers in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.selectors import farthest_point, topk_sorted, uniform_grid


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


def farthest_by_loop(rows: list[list[float]], k: int) -> list[int]:
    """Max-min diversity by its definition, recomputing every distance."""

    def distance(i: int, j: int) -> float:
        dot = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return 1 - dot / math.sqrt(math.fsum(a * a for a in rows[i]) * math.fsum(b * b for b in rows[j]))

    everyone = range(len(rows))
    chosen = [max(everyone, key=lambda i: min((distance(i, j) for j in everyone if j != i), default=0))]
    while len(chosen) < k:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance(i, j) for j in chosen)))
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


@pytest.mark.parametrize("seed", range(5))
def test_farthest_point_matches_the_loop(seed):
    features = torch.randn(2, 17, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for k in (1, 2, 6, 16, 17):
        assert farthest_point(features, k).tolist() == [farthest_by_loop(image.tolist(), k) for image in features]


def test_farthest_point_never_takes_a_token_twice_even_among_duplicates():
    got = farthest_point(torch.ones(1, 12, 4), 9)[0].tolist()
    assert len(set(got)) == 9
    assert got == sorted(got)


def test_farthest_point_ignores_length_and_batch_mates():
    features = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    together = farthest_point(features, 7)
    assert torch.equal(together, torch.cat([farthest_point(image[None], 7) for image in features]))
    assert torch.equal(together, farthest_point(features * torch.tensor([2.0, 0.25, 8.0]).view(3, 1, 1), 7))


def test_farthest_point_passes_no_gradient_and_takes_half_precision():
    features = torch.randn(1, 9, 4, requires_grad=True)
    assert not farthest_point(features, 3).requires_grad
    assert farthest_point(features.bfloat16(), 3).shape == (1, 3)


def test_uniform_grid_of_64_in_24_by_24_is_every_third_row_and_column():
    expected = [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert uniform_grid((1, 24, 24), 576, 64).tolist() == expected
