"""Bipartite matching against loops."""

import pytest
import torch

from lit_reduce.ops.matching import bipartite


@pytest.mark.parametrize("count", [8, 9, 2])
def test_the_most_alike_pairs_go_together(count):
    metric = torch.randn(3, count, 5, generator=torch.Generator().manual_seed(count)).double()
    for r in range(count // 2 + 1):
        into = bipartite(metric, r)
        for row, x in zip(into.tolist(), torch.nn.functional.normalize(metric, dim=-1), strict=True):
            pairs = [max((float(x[a] @ x[b]), -b) for b in range(1, count, 2)) for a in range(0, count, 2)]
            best = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], i))[:r]
            assert row == [-pairs[i // 2][1] if i % 2 == 0 and i // 2 in best else i for i in range(count)]


def test_equal_similarities_go_to_the_lower_index():
    assert bipartite(torch.ones(1, 6, 2), 2).tolist() == [[1, 1, 1, 3, 4, 5]]


def test_only_half_can_go():
    with pytest.raises(ValueError, match="5 of 8"):
        bipartite(torch.ones(1, 8, 2), 5)
