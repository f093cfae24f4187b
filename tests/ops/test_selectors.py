"""Selectors against loops over plain Python numbers in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.selectors import (
    least_similar,
    ranks,
    row_topk,
    share_topk,
    thin_out,
    topk_sorted,
    true_indices,
    uniform_grid,
)


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


def descending(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda n: (-scores[n], n))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_ranks_are_places_in_the_sorted_list(rows):
    got = ranks(torch.tensor(rows, dtype=torch.float32)).tolist()
    assert got == [[descending(row).index(n) for n in range(9)] for row in rows]


@given(st.permutations(range(8)), st.permutations(range(8)), st.integers(1, 8))
def test_places_lists_what_is_true(first, second, k):
    chosen = torch.zeros(2, 8, dtype=torch.bool)
    chosen[0, first[:k]] = chosen[1, second[:k]] = True
    assert true_indices(chosen, k).tolist() == [sorted(first[:k]), sorted(second[:k])]


@given(st.lists(st.integers(0, 9), min_size=12, max_size=12), st.sampled_from([2, 3, 4]), st.integers(1, 12))
def test_row_topk_takes_whole_rows_then_the_best_of_the_next(scores, columns, k):
    rows = [scores[start : start + columns] for start in range(0, 12, columns)]
    order = [
        row * columns + column for row in descending([sum(row) for row in rows]) for column in descending(rows[row])
    ]
    assert row_topk(torch.tensor([scores]).float(), columns, k).tolist() == [sorted(order[:k])]


@given(st.integers(0, 1000), st.integers(0, 4), st.integers(0, 4))
def test_share_topk_takes_the_best_of_each_part(seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    scores, part = torch.randint(0, 5, (2, 10), generator=generator).float(), torch.arange(10) % 2
    got = share_topk(scores, part, torch.tensor([[first, second], [second, first]]))
    for row, counts, chosen in zip(scores.tolist(), [(first, second), (second, first)], got.tolist(), strict=True):
        expected = [n for p in (0, 1) for n in [m for m in descending(row) if m % 2 == p][: counts[p]]]
        assert [n for n in range(10) if chosen[n]] == sorted(expected)


def thin_by_loop(order: list[int], similarity: list[list[float]], k: int, step: int) -> list[int]:
    while len(order) > k:
        even, odd = order[0::2], order[1::2]
        even = [even[i] for i in descending([max(similarity[i][j] for j in odd) for i in even])]
        order = even[min(step, len(order) - k) :] + odd
    return order


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 25), st.sampled_from([1, 3, 8]), st.data())
def test_thin_out_matches_the_loop(seed, count, step, data):
    k = data.draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(2, count, count, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    expected = []
    for row, table in zip(order.tolist(), similarity.tolist(), strict=True):
        left = row
        while len(left) > k:  # a round can drop no more than the even places hold
            left = thin_by_loop(left, table, max(k, len(left) - min(step, (len(left) + 1) // 2)), step)
        expected.append(left)
    assert thin_out(order, similarity, k, step).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 12))
def test_least_similar_matches_the_loop(seed, pivots, k):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(2, pivots, 12, generator=generator, dtype=torch.float64)
    kept = torch.zeros(2, 12, dtype=torch.bool)
    kept[0, [3, 7]] = kept[1, [0, 11]] = True
    for table, start, got in zip(
        similarity.tolist(), ([3, 7], [0, 11]), least_similar(similarity, kept, k).tolist(), strict=True
    ):
        stay, shares = list(start), [(p + 1) * (k - 2) // pivots - p * (k - 2) // pivots for p in range(pivots)]
        for row, share in zip(table, shares, strict=True):
            free = [n for n in range(12) if n not in stay]
            stay += sorted(free, key=lambda n, row=row: row[n])[:share]
        assert got == sorted(stay)
