"""Where tiles lie, drawn by hand."""

import pytest
import torch

from lit_reduce.ops.tiles import regions, tiling


def test_a_picture_in_one_piece_has_no_tiles():
    assert tiling((1, 4, 6), 24) is None
    assert tiling((1, 4, 6), 26) is None
    assert tiling((3, 4, 6), 80) is None


@pytest.mark.parametrize(
    ("frames", "crops"), [(2, (1, 1)), (3, (1, 2)), (4, (1, 3)), (5, (2, 2)), (7, (2, 3)), (8, (1, 7))]
)
def test_crops_lie_as_square_as_their_number_allows(frames, crops):
    tiles = tiling((frames, 2, 3), frames * 6)
    assert tiles.crops == crops
    assert tiles.whole == (2 * crops[0], 3 * crops[1])
    assert tiles.part.tolist() == [frame for frame in range(frames) for _ in range(6)]
    assert sorted(tiles.place[6:].tolist()) == list(range(6 * (frames - 1))), "crops cover the whole, once"


def test_four_crops_side_by_side():
    tiles = tiling((5, 1, 2), 10)
    assert tiles.place.tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, 6, 7]
    tiles = tiling((5, 2, 1), 10)
    assert tiles.place.tolist() == [-1, -1, 0, 2, 1, 3, 4, 6, 5, 7]
    last = tiling((5, 2, 1), 10, overview="last")
    assert last.first == 8
    assert last.place.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, -1, -1]
    assert last.part.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 0, 0]


def test_an_overview_and_a_packed_whole_with_newlines():
    tiles = tiling((1, 2, 3), 4 + 2 * 4)
    assert (tiles.overview, tiles.whole, tiles.crops) == ((2, 2), (2, 3), (1, 2))
    assert tiles.place.tolist() == [-1, -1, -1, -1, 0, 1, 2, -1, 3, 4, 5, -1]
    assert tiles.part.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 1, 1, 2, 3]


def test_regions_are_quadrants_and_official_ones_are_stripes():
    quadrants = regions((4, 4), (2, 2)).view(4, 4)
    assert torch.equal(quadrants, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]))
    assert regions((4, 4), (2, 2), stripes=True).view(4, 4).tolist() == [[row] * 4 for row in range(4)]
