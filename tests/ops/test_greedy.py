"""Greedy selectors against loops over plain Python numbers that know only the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.greedy import coverage, dpp_greedy, farthest_point, max_sum
from lit_reduce.ops.similarity import cosine


def cosine_of(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def greedy(count: int, k: int, value, chosen: list[int] | None = None) -> list[int]:
    """Add the token of the highest value, the lower index among equals, given those chosen."""
    chosen = list(chosen or [])
    while len(chosen) < k:
        chosen.append(max((n for n in range(count) if n not in chosen), key=lambda n: value(n, chosen)))
    return sorted(chosen)


def determinant(matrix: list[list[float]]) -> float:
    """By elimination with pivoting."""
    rows, result = [list(row) for row in matrix], 1.0
    for i in range(len(rows)):
        best = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        if best != i:
            rows[i], rows[best], result = rows[best], rows[i], -result
        result *= rows[i][i]
        if rows[i][i] == 0:
            return 0.0
        for r in range(i + 1, len(rows)):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return result


@st.composite
def problems(draw):
    """Two images of random tokens; continuous values, so that rounding cannot make ties."""
    count = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    features = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    scores = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return features, scores, draw(st.integers(1, count))


check = settings(max_examples=40, deadline=None)


@check
@given(problems())
def test_farthest_point(problem):
    features, _, k = problem
    for image, got in zip(features.tolist(), farthest_point(features, k).tolist(), strict=True):
        everyone = range(len(image))
        far = [[1 - cosine_of(a, b) for b in image] for a in image]
        first = max(everyone, key=lambda i: min((far[i][j] for j in everyone if j != i), default=0))
        assert got == greedy(len(image), k, lambda n, chosen, far=far: min(far[n][j] for j in chosen), [first])


@check
@given(problems())
def test_max_sum(problem):
    features, scores, k = problem
    first = scores.argmax(-1)
    for image, start, got in zip(features.tolist(), first.tolist(), max_sum(features, first, k).tolist(), strict=True):
        alike = [[cosine_of(a, b) for b in image] for a in image]
        assert got == greedy(
            len(image), k, lambda n, chosen, alike=alike: -math.fsum(alike[n][j] for j in chosen), [start]
        )


@check
@given(problems(), st.sampled_from(["plain", "weight", "bonus"]))
def test_coverage(problem, mode):
    features, scores, k = problem
    table = torch.cat([cosine(features), features[:, :, :3].transpose(1, 2).softmax(-1)], 1)
    parts = {} if mode == "plain" else {mode: scores}
    for image, extra, got in zip(table.tolist(), scores.tolist(), coverage(table, k, **parts).tolist(), strict=True):

        def gain(n, chosen, image=image, extra=extra):
            covered = [max([0.0, *(row[j] for j in chosen)]) for row in image]
            value = math.fsum(max(row[n] - done, 0) for row, done in zip(image, covered, strict=True))
            return value * extra[n] if mode == "weight" else value + extra[n] if mode == "bonus" else value

        assert got == greedy(len(image[0]), k, gain)


@check
@given(problems())
def test_dpp_raises_the_determinant_most_as_far_as_the_rank_goes(problem):
    features, scores, k = problem
    k, quality = min(k, features.shape[-1]), scores + 0.1
    kernel = quality[:, :, None] * cosine(features) * quality[:, None]
    for image, got in zip(kernel.tolist(), dpp_greedy(kernel, k).tolist(), strict=True):

        def value(n, chosen, image=image):
            return determinant([[image[i][j] for j in [*chosen, n]] for i in [*chosen, n]])

        assert got == greedy(len(image), k, value)


def test_dpp_beyond_the_rank_goes_by_quality():
    features = torch.eye(2, dtype=torch.float64)[torch.tensor([0, 0, 1, 0, 1, 1])][None]
    quality = torch.tensor([[0.9, 0.5, 0.8, 0.7, 0.2, 0.6]], dtype=torch.float64)
    kernel = quality[:, :, None] * cosine(features) * quality[:, None]
    assert [dpp_greedy(kernel, k)[0].tolist() for k in (1, 2, 3, 4)] == [[0], [0, 2], [0, 2, 3], [0, 2, 3, 5]]
    noisy = kernel.float() + 1e-8 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert dpp_greedy(noisy, 4)[0].tolist() == [0, 2, 3, 5]


def select(name: str, x: torch.Tensor, k: int) -> torch.Tensor:
    """Every selector with features alone, saliency equal."""
    same = torch.ones(x.shape[:2])
    return {
        "farthest": lambda: farthest_point(x, k),
        "max_sum": lambda: max_sum(x, torch.zeros(len(x), dtype=torch.long), k),
        "coverage": lambda: coverage(cosine(x), k, same),
        "dpp": lambda: dpp_greedy(cosine(x), k),
    }[name]()


every = pytest.mark.parametrize("name", ["farthest", "max_sum", "coverage", "dpp"])


@every
def test_among_duplicates_none_is_taken_twice_and_lower_indices_win(name):
    assert select(name, torch.ones(2, 12, 4), 9).tolist() == [list(range(9))] * 2


@every
def test_length_and_batch_mates_do_not_matter(name):
    features = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    together = select(name, features, 7)
    assert torch.equal(together, torch.cat([select(name, image[None], 7) for image in features]))
    assert torch.equal(together, select(name, features * torch.tensor([2.0, 0.25, 8.0]).view(3, 1, 1), 7))


@every
def test_no_gradient_passes_and_half_precision_is_taken(name):
    features = torch.randn(1, 9, 4, requires_grad=True)
    assert not select(name, features, 3).requires_grad
    assert select(name, features.bfloat16(), 3).shape == (1, 3)


@pytest.mark.parametrize("alike", [0.0, 5.0])
def test_coverage_of_many_tokens_equals_evaluating_all_at_each_step(alike):
    """More tokens than one lazy step evaluates; with duplicates, and with all tokens alike, bounds are often tied."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 90, 8, generator=draw, dtype=torch.float64) + alike
    table, weight = cosine(x).clamp_min(0), torch.rand(2, 90, generator=draw, dtype=torch.float64) + 0.5
    table[..., 60:], weight[:, 60:] = table[..., :30], weight[:, :30]
    for image, got in enumerate(coverage(table, 25, weight, 0.1 * weight).tolist()):
        covered, chosen = torch.zeros(90, dtype=torch.float64), []
        for _ in range(25):
            gain = (table[image] - covered[:, None]).clamp_min(0).sum(0) * weight[image] + 0.1 * weight[image]
            chosen.append(max((n for n in range(90) if n not in chosen), key=lambda n: (round(float(gain[n]), 10), -n)))
            covered = torch.maximum(covered, table[image][:, chosen[-1]])
        assert got == sorted(chosen)
