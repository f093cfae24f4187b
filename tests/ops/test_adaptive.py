"""Counts that the scores decide, against numpy and plain loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.adaptive import outlier_count, ragged_indices

rows = st.lists(st.integers(0, 40), min_size=4, max_size=30).filter(sum)


@given(rows)
def test_outliers_lie_beyond_one_and_a_half_quartile_ranges(row):
    low, high = np.percentile(row, [25, 75])
    assert outlier_count(torch.tensor([row]).double()).tolist() == [sum(x > high + 1.5 * (high - low) for x in row)]


def test_ragged_indices_pads_behind():
    chosen = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    kept_indices, valid = ragged_indices(chosen, 3)
    assert kept_indices.tolist() == [[0, 2, 4], [1, 2, 3], [4, 4, 4]]
    assert valid.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
