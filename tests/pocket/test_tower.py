"""The tower's losses: what patches show, and where they are."""

import pytest
import torch

from lit_reduce_pocket.tower import Heads, place_loss
from lit_reduce_pocket.world import GRID


def test_place_loss_is_the_mean_squared_distance_to_column_and_row() -> None:
    heads = Heads(8)
    hidden = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([[0, 23, 575], [24, 100, 301]])
    said = heads.place(heads.norm(hidden[:, 1:]))
    total = 0.0
    for b in range(2):
        for p in range(3):
            row, column = divmod(int(where[b, p]), GRID)
            goal = (2 * column / 23 - 1, 2 * row / 23 - 1)
            total += sum((float(said[b, p, i]) - goal[i]) ** 2 for i in (0, 1))
    assert float(place_loss(heads, hidden, where)) == pytest.approx(total / 6, rel=1e-5)
