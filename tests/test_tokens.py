"""The vocabulary: gathering, budgets and their refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reduce.errors import UserError
from lit_reduce.tokens import Budget, Reduction, VisualTokens


def test_gather_copies_the_anchors_bit_by_bit():
    tokens = VisualTokens(torch.randn(2, 6, 3), (1, 2, 3))
    kept_indices = torch.tensor([[0, 4], [1, 5]])
    expected = torch.stack([torch.stack([tokens.features[b, i] for i in row]) for b, row in enumerate(kept_indices)])
    assert torch.equal(Reduction(kept_indices).gather(tokens), expected)


def test_gather_prefers_new_features_and_passes_gradients():
    features = torch.randn(1, 4, 2, requires_grad=True)
    tokens = VisualTokens(features, (1, 2, 2))
    made = torch.randn(1, 1, 2)
    assert Reduction(torch.tensor([[2]]), features=made).gather(tokens) is made
    Reduction(torch.tensor([[2]])).gather(tokens).sum().backward()
    assert features.grad.sum(-1).tolist() == [[0, 0, 2, 0]]


def test_tokens_are_frozen_checked_and_name_what_is_missing():
    tokens = VisualTokens(torch.zeros(1, 4, 2), (1, 2, 2), {"cls": torch.zeros(1, 4)})
    assert tokens.count == 4
    assert tokens.signal("cls").shape == (1, 4)
    with pytest.raises(UserError, match=r"'text' is missing \(given: cls\)"):
        tokens.signal("text")
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.grid = (1, 1, 4)
    with pytest.raises(ValueError, match=r"\[B, N, D\]"):
        VisualTokens(torch.zeros(4, 2), (1, 2, 2))


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_ratio_keeps_the_nearest_count_and_at_least_one(ratio, n):
    kept = Budget.parse(ratio).count(n)
    assert 1 <= kept <= n
    assert kept == 1 or abs(kept - ratio * n) <= 0.5


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        (64, 64),
        ("64", 64),
        (" 64 ", 64),
        (0.25, 144),
        ("0.25", 144),
        ("1e-9", 1),
        (1, 1),
        (1.0, 576),
        ("1.0", 576),
        (576, 576),
        (np.int64(8), 8),
        (np.float32(0.5), 288),
        (Budget(3), 3),
    ],
)
def test_parse_reads_counts_and_ratios(given_, kept):
    assert Budget.parse(given_).count(576) == kept


@pytest.mark.parametrize(
    "given_", [0, -1, "0", "-3", 0.0, -0.5, 1.5, "2.0", math.nan, "nan", "inf", "x", "", "1/2", None, True, [64], "1e3"]
)
def test_parse_refuses_everything_else_in_one_line(given_):
    with pytest.raises(UserError, match="keep=") as caught:
        Budget.parse(given_)
    assert "\n" not in str(caught.value)


def test_count_above_the_tokens_names_the_limit():
    with pytest.raises(UserError, match=r"keep=577.* only 576 .*at most 576"):
        Budget.parse(577).count(576)
