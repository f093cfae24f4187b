"""What every cut of a grid must satisfy, whatever its size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.cells import cells, members


@st.composite
def cuts(draw):
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    count = grid[0] * grid[1] * grid[2] + draw(st.sampled_from([0, 0, 5]))
    return grid, count, draw(st.integers(1, count))


@given(cuts())
def test_exactly_k_cells_cover_every_token_once(cut):
    _, count, k = cut
    kept_indices, assignment = (part.tolist() for part in cells(*cut))
    assert len(kept_indices) == k
    assert len(assignment) == count
    assert kept_indices == sorted(set(kept_indices))
    assert set(assignment) == set(range(k))
    assert [assignment[anchor] for anchor in kept_indices] == list(range(k)), "a cell's centre must lie in the cell"


@given(cuts())
def test_members_of_a_cell_are_the_tokens_that_it_owns(cut):
    _, assignment = cells(*cut)
    inside, real = members(assignment, cut[2])
    assert inside.shape == (cut[2], int(assignment.bincount().max()))
    for cell in range(cut[2]):
        assert inside[cell][real[cell]].tolist() == (assignment == cell).nonzero()[:, 0].tolist()
        assert set(inside[cell].tolist()) == set(inside[cell][real[cell]].tolist()), "padding must repeat a member"


@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_cells_of_a_frame_are_rectangles_of_about_one_size(rows, columns, data):
    k = data.draw(st.integers(1, rows * columns))
    _, assignment = cells((1, rows, columns), rows * columns, k)
    shapes = []
    for cell in range(k):
        where = (assignment.view(rows, columns) == cell).nonzero()
        height, width = (where.amax(0) - where.amin(0) + 1).tolist()
        assert height * width == len(where), "not a rectangle"
        shapes.append((height, width))
    heights, widths = zip(*shapes, strict=True)
    assert max(heights) - min(heights) <= 1
    bands = len({int((assignment.view(rows, columns) == cell).nonzero()[0, 0]) for cell in range(k)})
    assert max(widths) - min(widths) <= -(-columns // (k // bands)) - columns // -(-k // bands)


@pytest.mark.parametrize(
    ("k", "shape"), [(192, {(2, 1), (2, 2)}), (128, {(3, 1), (3, 2)}), (64, {(3, 3)}), (32, {(6, 3)}), (16, {(6, 6)})]
)
def test_budgets_in_use_on_24_by_24(k, shape):
    _, assignment = cells((1, 24, 24), 576, k)
    seen = set()
    for cell in range(k):
        where = (assignment.view(24, 24) == cell).nonzero()
        seen.add(tuple((where.amax(0) - where.amin(0) + 1).tolist()))
    assert seen == shape


def test_frames_share_the_budget_evenly_and_merge_when_it_is_short():
    _, assignment = cells((3, 4, 4), 48, 12)
    assert [len(set(frame.tolist())) for frame in assignment.view(3, 16)] == [4, 4, 4]
    kept_indices, assignment = cells((4, 2, 2), 16, 2)
    assert assignment.tolist() == [0] * 8 + [1] * 8
    assert [anchor // 4 for anchor in kept_indices.tolist()] == [0, 2]


def test_newline_tokens_are_cut_as_a_plain_sequence():
    _, assignment = cells((1, 2, 2), 6, 3)
    assert assignment.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("k", [0, 10])
def test_impossible_counts_raise(k):
    with pytest.raises(ValueError, match="cannot cut 9 tokens"):
        cells((1, 3, 3), 9, k)


def test_callers_cannot_spoil_the_cache():
    for part in cells((1, 4, 4), 16, 4):
        part.zero_()
    assert cells((1, 4, 4), 16, 4)[0].tolist() == [0, 2, 8, 10]
