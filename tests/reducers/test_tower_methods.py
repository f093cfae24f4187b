"""How many tokens the methods inside the vision tower keep at each block; the tower's own tests say what they do."""

from itertools import pairwise

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens


@pytest.mark.parametrize(
    ("depth", "tokens", "keep"), [(6, 576, 64), (23, 576, 192), (6, 576, 9), (3, 36, 35), (1, 5, 3)]
)
def test_tome_merges_evenly_and_at_most_halves(depth, tokens, keep):
    left = create("tome").stages(depth, tokens, keep)
    counts = [tokens, *(left[block] for block in range(depth))]
    merged = [a - b for a, b in pairwise(counts)]
    assert counts[-1] == keep
    assert all(0 <= r <= a // 2 for r, a in zip(merged, counts, strict=False))
    if keep * 4 > tokens:
        assert max(merged) - min(merged) <= 1


def test_tome_says_what_it_cannot_reach():
    with pytest.raises(UserError, match="give at least 9"):
        create("tome").stages(6, 576, 8)


def test_tome_by_the_mean_of_heads():
    keys = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, 3)
    ones = torch.ones(1, 6)
    mean = create("tome", heads=2)(VisualTokens(x, (1, 2, 3), {"keys": keys, "size": ones}), 4)
    folded = keys.view(1, 6, 2, 4).mean(2)
    side = create("tome")(VisualTokens(x, (1, 2, 3), {"keys": folded, "size": ones}), 4)
    assert torch.equal(mean.kept_indices, side.kept_indices)
    assert torch.equal(mean.features, side.features)


def test_evit_keeps_the_same_share_at_three_blocks():
    assert create("evit").stages(12, 1000, 343) == {3: 700, 6: 490, 9: 343}
    assert create("evit").stages(24, 576, 64) == {6: 277, 12: 134, 18: 64}
    assert create("evit").stages(2, 100, 25) == {0: 50, 1: 25}
