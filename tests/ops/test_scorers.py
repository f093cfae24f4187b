"""Scorers against loops in float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.scorers import (
    information_flow,
    key_norm,
    rater_scores,
    single_head_attention,
    text_coverage,
    text_raters,
    text_relevance,
)

few = settings(max_examples=25, deadline=None)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [x / math.fsum(powers) for x in powers]


def prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, prompt embeddings with noise where they are padded, and the mask."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    return draw(seed, 2, 6, 3), draw(seed + 1, 2, 4, 3), mask


@few
@given(st.integers(0, 1000))
def test_text_relevance_is_the_mean_cosine_with_real_words(seed):
    x, text, mask = prompts(seed)
    for image, got in enumerate(text_relevance(x, text, mask).tolist()):
        words = [t for t, real in zip(text[image].tolist(), mask[image].tolist(), strict=True) if real]
        for token, value in zip(x[image].tolist(), got, strict=True):
            cosines = [dot(token, t) / math.hypot(*token) / math.hypot(*t) for t in words]
            assert math.isclose(value, math.fsum(cosines) / len(words), abs_tol=1e-12)
    assert text_relevance(x, text, mask & False).tolist() == [[0.0] * 6] * 2


@few
@given(st.integers(0, 1000), st.sampled_from([0.02, 0.5]))
def test_text_coverage_shares_each_word_among_the_tokens(seed, temperature):
    x, text, mask = prompts(seed)
    got = text_coverage(x, text, mask, temperature)
    for image in range(2):
        tokens = x[image].tolist()
        for word in range(4):
            if not mask[image, word]:
                assert got[image, word].tolist() == [0.0] * 6
                continue
            t = text[image, word].tolist()
            row = softmax([dot(t, v) / math.hypot(*t) / math.hypot(*v) / temperature for v in tokens])
            torch.testing.assert_close(got[image, word].tolist(), [p / int(mask[image].sum()) for p in row])


def test_key_norm_is_the_sum_of_absolute_entries():
    assert key_norm(torch.tensor([[[1.0, -2], [0, 3]]])).tolist() == [[3, 3]]


@few
@given(st.integers(0, 1000))
def test_single_head_is_one_softmax_over_the_tokens(seed):
    query, keys = draw(seed, 2, 4), draw(seed + 1, 2, 6, 4)
    for q, rows, got in zip(query.tolist(), keys.tolist(), single_head_attention(query, keys).tolist(), strict=True):
        torch.testing.assert_close(got, softmax([dot(q, k) / 2 for k in rows]))


@few
@given(st.integers(0, 1000), st.sampled_from([1, 2]))
def test_flow_matches_the_loop(seed, heads):
    attention, values, reader = draw(seed, 2, 5).abs(), draw(seed + 1, 2, 5, 4), draw(seed + 2, 2, 4)
    got, width = information_flow(attention, values, reader, heads), 4 // heads
    for image in range(2):
        v, r = values[image].tolist(), reader[image].tolist()
        parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
        # The reader is among the values that it reads.
        heads_of = [softmax([dot(token[part], r[part]) for token in [r, *v]])[1:] for part in parts]
        meaning = [math.fsum(row[j] for row in heads_of) for j in range(5)]
        for j in range(5):
            relevance = float(attention[image, j] / attention[image].sum())
            mean = [math.fsum(v[j][part][d] for part in parts) / heads for d in range(width)]
            size = math.fsum(abs(x) for x in mean)
            expected = (relevance + meaning[j] / math.fsum(meaning)) * size
            assert math.isclose(got[image, j], expected, rel_tol=1e-9)


def test_raters_look_more_than_the_mean_word_and_padding_never_rates():
    rows = torch.tensor([[[0.3, 0.1], [0.1, 0.1], [0.1, 0.2], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert text_raters(rows, mask).tolist() == [[True, False, False, False], [False] * 4]


def test_words_before_the_picture_do_not_lower_the_mean():
    rows = torch.tensor([[[0.0, 0], [0, 0], [0.30, 0.10], [0, 0.25]]])
    who = text_raters(rows, torch.ones(1, 4, dtype=torch.bool))
    assert who.nonzero()[:, 1].tolist() == [2]
    assert rater_scores(rows, who).argmax(-1).tolist() == [0]


def test_rated_is_the_mean_of_the_raters_rows_or_of_all():
    rows = torch.tensor([[[1.0, 2], [3, 6], [5, 1]]] * 2)
    who = torch.tensor([[True, False, True], [False] * 3])
    assert rater_scores(rows, who).tolist() == [[3, 1.5], [3, 3]]
