"""Counts that the scores decide, against numpy and plain loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.ops.adaptive import elbow_count, mass_count, outlier_count, ragged_places

rows = st.lists(st.integers(0, 40), min_size=4, max_size=30).filter(sum)


@given(rows)
def test_outliers_lie_beyond_one_and_a_half_quartile_ranges(row):
    low, high = np.percentile(row, [25, 75])
    assert outlier_count(torch.tensor([row]).double()).tolist() == [sum(x > high + 1.5 * (high - low) for x in row)]


@given(rows, st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_mass_is_held_by_the_fewest(row, share):
    total, held, count = sum(row), 0, 0
    for x in sorted(row, reverse=True):
        held, count = held + x, count + 1
        if held >= share * total:
            break
    assert mass_count(torch.tensor([row]).double(), share).tolist() == [count]


def test_elbow_of_a_curve_that_bends_after_three():
    assert elbow_count(torch.tensor([[9.0, 0.2, 8.8, 0.1, 9.1, 0.0, 0.3]])).tolist() == [4]
    assert elbow_count(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [1]


@given(rows)
def test_elbow_is_farthest_below_the_chord(row):
    curve = sorted(row, reverse=True)
    chord = [curve[0] + (curve[-1] - curve[0]) * i / (len(curve) - 1) for i in range(len(curve))]
    below = [c - y for c, y in zip(chord, curve, strict=True)]
    got = int(elbow_count(torch.tensor([row]).double())) - 1
    assert below[got] >= max(below) - 1e-9


def test_ragged_places_pads_behind():
    chosen = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    kept_indices, valid = ragged_places(chosen, 3)
    assert kept_indices.tolist() == [[0, 2, 4], [1, 2, 3], [4, 4, 4]]
    assert valid.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
