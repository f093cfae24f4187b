"""Modifiers by hand and by loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.modifiers import centre, min_max, sinks, unit_length, with_neighbours


def test_centre_takes_the_mean_of_each_image_out():
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = torch.stack([image - sum(image) / 7 for image in x])
    torch.testing.assert_close(centre(x), expected)
    assert centre(x.bfloat16()).dtype == torch.bfloat16


def test_min_max_stays_within_its_image():
    got = min_max(torch.tensor([[1.0, 2, 3], [10, 30, 20], [5, 5, 5]]), floor=0.5)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.75, 1.25], [0.025, 1.025, 0.525], [1, 1, 1]]))


def test_unit_length():
    assert unit_length(torch.tensor([[3.0, 4], [0, 0]])).tolist() == [[0.6000000238418579, 0.800000011920929], [0, 0]]


def test_sinks_have_one_massive_entry():
    x = torch.ones(1, 3, 64)
    x[0, 1, 5] = -100.0
    assert sinks(x, 7.0).tolist() == [[False, True, False]]
    assert sinks(x, 7.0, dims=(4,)).tolist() == [[False] * 3]
    assert sinks(x, 7.0, dims=(4, 5)).tolist() == [[False, True, False]]
    assert sinks(1000 * x, 7.0).tolist() == sinks(x, 7.0).tolist(), "what counts is the shape, not the length"
    assert not sinks(x, 8.0).any(), "sqrt(64) is the most that one entry can be"


@given(st.sampled_from([(1, 3, 4), (2, 2, 3), (3, 1, 5)]), st.integers(0, 500), st.booleans())
def test_neighbours_match_the_loop(grid, seed, wrap):
    frames, rows, columns = grid
    count = frames * rows * columns
    chosen = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.2
    for before, after in zip(chosen.tolist(), with_neighbours(chosen, grid, wrap).tolist(), strict=True):
        expected = list(before)
        for n in (n for n in range(count) if before[n]):
            frame, place = divmod(n, rows * columns)
            row, column = divmod(place, columns)
            near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            for r, c in near:
                to = r * columns + c
                if wrap:
                    to = min(max(to, 0), rows * columns - 1)
                if wrap or (0 <= r < rows and 0 <= c < columns):
                    expected[frame * rows * columns + to] = True
        assert after == expected


def test_neighbours_among_newline_tokens_are_those_before_and_after():
    chosen = torch.zeros(1, 7, dtype=torch.bool)
    chosen[0, 3] = True
    assert with_neighbours(chosen, (1, 2, 3))[0].nonzero()[:, 0].tolist() == [2, 3, 4]
