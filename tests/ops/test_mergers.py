"""Mergers against loops in float64, and against torch where torch does the same."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.cells import cells
from lit_reduce.ops.mergers import (
    average_pool,
    mean_pairwise_cosine,
    merge_attention,
    merge_mean,
    merge_sum,
    nearest,
    to_assignment,
    windows,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_average_pool_matches_the_loop(rows, columns, data):
    k = data.draw(st.integers(1, rows * columns))
    features = torch.randn(2, rows * columns, 3, generator=torch.Generator().manual_seed(k))
    pooled, kept_indices, assignment = average_pool(features, (1, rows, columns), k)
    expected = torch.zeros(2, k, 3, dtype=torch.float64)
    for image in range(2):
        for cell in range(k):
            members = [n for n in range(rows * columns) if assignment[n] == cell]
            for width in range(3):
                expected[image, cell, width] = sum(float(features[image, n, width]) for n in members) / len(members)
    torch.testing.assert_close(pooled.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(kept_indices, cells((1, rows, columns), rows * columns, k)[0])


def test_average_pool_is_adaptive_pooling_where_the_sizes_divide():
    features = torch.randn(2, 576, 4, generator=torch.Generator().manual_seed(0))
    pooled, _, _ = average_pool(features, (1, 24, 24), 64)
    image = features.transpose(1, 2).view(2, 4, 24, 24)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, 8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected)


def test_average_pool_keeps_dtype_and_sums_in_float32():
    features = torch.ones(1, 576, 1, dtype=torch.bfloat16)
    features[:, ::2] = 1.0078125
    pooled, _, _ = average_pool(features, (1, 24, 24), 1)
    assert pooled.dtype == torch.bfloat16
    # A running bfloat16 sum would stick at 256 and give 0.44.
    assert abs(pooled.item() - 1.0039) < 0.005


def test_average_pool_passes_gradients():
    features = torch.randn(1, 12, 2, requires_grad=True)
    average_pool(features, (1, 3, 4), 4)[0].sum().backward()
    assert torch.all(features.grad > 0)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine_of(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def add(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [math.fsum(w * v[d] for v, w in zip(vectors, weights, strict=True)) for d in range(len(vectors[0]))]


@st.composite
def cases(draw_):
    seed, count = draw_(st.integers(0, 1000)), draw_(st.integers(2, 9))
    k = draw_(st.integers(1, count))
    kept_indices = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(seed + b))[:k] for b in (0, 1)]
    )
    return seed, count, k, kept_indices.sort(-1).values


few = settings(max_examples=40, deadline=None)


@few
@given(cases())
def test_nearest_matches_the_loop(case):
    seed, count, k, kept_indices = case
    metric = draw(seed, 2, count, 4)
    for image, chosen, got in zip(
        metric.tolist(), kept_indices.tolist(), nearest(metric, kept_indices).tolist(), strict=True
    ):
        expected = [max(range(k), key=lambda i, n=n: cosine_of(image[n], image[chosen[i]])) for n in range(count)]
        assert got == [chosen.index(n) if n in chosen else expected[n] for n in range(count)]


def test_nearest_leaves_equal_anchors_to_themselves_and_others_to_the_first():
    assert nearest(torch.ones(1, 4, 2), torch.tensor([[1, 3]])).tolist() == [[0, 0, 0, 1]]


@few
@given(cases(), st.booleans())
def test_merge_mean_and_sum_match_the_loop(case, weighted):
    seed, count, k, kept_indices = case
    features, assignment = draw(seed, 2, count, 3), nearest(draw(seed + 1, 2, count, 4), kept_indices)
    assignment[0, [n for n in range(count) if n not in kept_indices[0].tolist()][:1]] = -1
    weight = draw(seed + 2, 2, count).abs() + 0.1 if weighted else None
    made, mass = merge_mean(features, assignment, k, weight)
    added = merge_sum(features, assignment, kept_indices)
    for image in range(2):
        x, weights = features[image].tolist(), [1.0] * count if weight is None else weight[image].tolist()
        for token in range(k):
            members = [n for n in range(count) if assignment[image, n] == token]
            total = math.fsum(weights[n] for n in members)
            mean = add([x[n] for n in members], [weights[n] / total for n in members])
            torch.testing.assert_close(made[image, token].tolist(), mean)
            assert math.isclose(mass[image, token], total)
            anchor = int(kept_indices[image, token])
            others = [n for n in members if n != anchor]
            mean = add([x[n] for n in others], [1 / len(others)] * len(others)) if others else [0.0] * 3
            torch.testing.assert_close(added[image, token].tolist(), add([x[anchor], mean], [1, 1]))


def test_merge_mean_of_nobody_is_zero_and_weighs_nothing():
    made, mass = merge_mean(torch.ones(1, 2, 3), torch.tensor([[1, -1]]), 2)
    assert made.tolist() == [[[0, 0, 0], [1, 1, 1]]]
    assert mass.tolist() == [[0, 1]]


def test_merge_mean_keeps_half_precision_and_passes_gradients():
    features = torch.randn(1, 6, 2, dtype=torch.bfloat16, requires_grad=True)
    made, _ = merge_mean(features, torch.zeros(1, 6, dtype=torch.long), 1)
    assert made.dtype == torch.bfloat16
    made.sum().backward()
    assert torch.all(features.grad > 0)


@few
@given(cases(), st.integers(1, 12))
def test_merge_attention_matches_the_loop(case, neighbours):
    seed, count, k, kept_indices = case
    features, metric = draw(seed, 2, count, 3), draw(seed + 1, 2, count, 4)
    attention = draw(seed + 2, 2, count).softmax(-1)
    made = merge_attention(features, metric, attention, kept_indices, neighbours)
    for image in range(2):
        x, keys, weights = features[image].tolist(), metric[image].tolist(), attention[image].tolist()
        for token in range(k):
            i = int(kept_indices[image, token])
            near = sorted((n for n in range(count) if n != i), key=lambda n: -cosine_of(keys[i], keys[n]))[:neighbours]
            expected = add([x[i], *(x[n] for n in near)], [1.0, *(weights[n] for n in near)])
            torch.testing.assert_close(made[image, token].tolist(), expected)


def test_to_assignment_numbers_the_targets():
    kept_indices, target = torch.tensor([[1, 4], [0, 2]]), torch.tensor([[1, 1, -1, 4, 4], [0, 0, 2, 2, -1]])
    assert to_assignment(kept_indices, target).tolist() == [[0, 0, -1, 1, 1], [0, 0, 1, 1, -1]]


def test_windows_of_a_grid_with_a_border():
    expected = [0, 0, 1, 1, -1, 0, 0, 1, 1, -1, -1, -1, -1, -1, -1]
    assert windows((1, 3, 5), 2).tolist() == expected
    assert windows((2, 3, 5), 2).tolist() == expected + [n + 2 if n >= 0 else -1 for n in expected]


@few
@given(cases())
def test_agreement_is_the_mean_cosine_of_pairs(case):
    seed, count, k, kept_indices = case
    features, assignment = draw(seed, 2, count, 4), nearest(draw(seed + 1, 2, count, 4), kept_indices)
    got = mean_pairwise_cosine(features, assignment, k)
    for image in range(2):
        x = features[image].tolist()
        for group in range(k):
            members = [n for n in range(count) if assignment[image, n] == group]
            pairs = [cosine_of(x[a], x[b]) for a, b in itertools.combinations(members, 2)]
            assert math.isclose(got[image, group], math.fsum(pairs) / len(pairs) if pairs else 1.0, abs_tol=1e-9)
