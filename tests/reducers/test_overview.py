"""The overview alone, and which of its cells shows what a crop shows."""

import torch

from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens


def test_the_overview_and_where_each_crop_shows() -> None:
    """An overview of 2 x 2, then 2 x 2 crops of 2 x 2 each, raster by raster: a crop lies in one token's place."""
    tokens = VisualTokens(torch.arange(20.0).view(1, 20, 1), (5, 2, 2))
    out = create("overview")(tokens, 4)
    assert out.kept_indices.tolist() == [[0, 1, 2, 3]]
    assert out.features.flatten().tolist() == [0, 1, 2, 3]
    assert out.assignment.tolist() == [[0, 1, 2, 3] + [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4]
    less = create("overview")(tokens, 1)
    assert less.features.flatten().tolist() == [1.5]
    assert less.assignment.tolist() == [[0] * 20]


def test_newlines_belong_nowhere() -> None:
    """LLaVA-NeXT's layout: an overview of 2 x 2, then 2 rows of 4 with a newline behind each."""
    out = create("overview")(VisualTokens(torch.randn(1, 14, 3), (1, 2, 4)), 4)
    assert out.assignment.tolist() == [[0, 1, 2, 3, 0, 0, 1, 1, -1, 2, 2, 3, 3, -1]]


def test_a_picture_in_one_piece_and_more_than_the_overview_are_pooled() -> None:
    for grid, keep in (((1, 4, 5), 6), ((5, 2, 2), 7)):
        tokens = VisualTokens(torch.randn(2, 20, 3), grid)
        assert torch.equal(create("overview")(tokens, keep).features, create("pool")(tokens, keep).features)


def test_crops_are_looked_back_at_through_the_overview() -> None:
    reducer = create("flexattention", hidden_size=3, depth=4, rank=2, short="overview")
    out = reducer(VisualTokens(torch.randn(1, 20, 3), (5, 2, 2)), 4)
    assert out.memory.shape == (1, 20, 2)
    assert out.assignment[0, 4:].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
