"""Methods inside tower and decoder: published schedules, and loops for what they keep and merge."""

import itertools
import math

import pytest
import torch

from lit_reduce.reducer import create
from lit_reduce.tokens import Course, VisualTokens


def descending(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda n: (-scores[n], n))


def cosine_of(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_published_schedules():
    assert create("visiondrop").stages(32, 576, 72) == {8: 288, 16: 144, 24: 72}
    # Layers 2, 6 and 15 work on all that they get, and pass on less.
    assert list(create("sparsevlm").stages(32, 576, 113)) == [3, 7, 16]
    assert list(create("mustdrop_prefill").stages(32, 576, 113)) == [3, 7, 16]
    assert create("efficientvla").stages(32, 256, 56) == {2: 56}
    assert create("mustdrop").stages(23, 576, 64) == {1: 64}


def test_flowcut_acts_before_every_second_block_and_slows_down_towards_the_start():
    stages = create("flowcut", pace=1.0).stages(23, 576, 64)
    assert list(stages) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    now = 576
    for layer, left in list(stages.items())[:-1]:
        assert left == now - round((now - 64) / math.sqrt(22 - layer))
        now = left
    assert stages[22] == 64


def test_turbo_spares_the_attended(made):
    reducer = create("turbo")
    tokens = made(reducer)
    tokens.signals["keys"] = torch.ones_like(tokens.signals["keys"])  # all alike, so that attention alone decides
    for image, kept_indices in enumerate(reducer(tokens, 16).kept_indices.tolist()):
        attention = tokens.signals["cls"][image].tolist()
        gone = [n for n in range(24) if n not in kept_indices]
        assert gone == sorted(sorted(range(0, 24, 2), key=lambda n: (attention[n], n))[:8])


def test_turbo_without_attention_is_tome(made):
    tokens = made(create("turbo"))
    one, other = create("turbo", alpha=0.0)(tokens, 15), create("tome")(tokens, 15)
    assert torch.equal(one.kept_indices, other.kept_indices)
    assert torch.equal(one.features, other.features)


def mustdrop_by_loop(x, attention, columns, keep):
    windows = [
        [row * columns + column for row in range(top, top + 3) for column in range(left, left + 3)]
        for top in range(0, len(x) // columns - 2, 3)
        for left in range(0, columns - 2, 3)
    ]
    alike = [sum(cosine_of(x[a], x[b]) for a, b in itertools.combinations(w, 2)) / 36 for w in windows]
    merged = [windows[i] for i in descending(alike)[: (len(x) - keep) // 8]]
    units = merged + [[n] for n in range(len(x)) if not any(n in w for w in merged)]
    units = sorted(units, key=lambda unit: -sum(attention[n] for n in unit))[:keep]
    units = sorted(units, key=max)
    means = [[sum(x[n][d] for n in unit) / len(unit) for d in range(len(x[0]))] for unit in units]
    return [max(unit) for unit in units], means


@pytest.mark.parametrize(("rows", "columns", "keep"), [(6, 6, 20), (6, 6, 4), (6, 6, 17), (7, 8, 40), (6, 6, 2)])
def test_mustdrop_merges_the_most_alike_windows_then_drops(rows, columns, keep, made):
    reducer = create("mustdrop")
    tokens = made(reducer, grid=(1, rows, columns))
    reduction = reducer(tokens, keep)
    for image in range(3):
        kept_indices, means = mustdrop_by_loop(
            tokens.features[image].tolist(), tokens.signals["cls"][image].tolist(), columns, keep
        )
        assert reduction.kept_indices[image].tolist() == kept_indices
        torch.testing.assert_close(reduction.features[image], torch.tensor(means), atol=1e-5, rtol=1e-5)


def test_mustdrop_at_64_of_576_is_every_window(made):
    reducer = create("mustdrop")
    tokens = made(reducer, batch=1, grid=(1, 24, 24))
    image = tokens.features.transpose(1, 2).view(1, 6, 24, 24)
    expected = torch.nn.functional.avg_pool2d(image, 3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reducer(tokens, 64).features, expected)


def test_mustdrop_prefill_drops_what_is_below_both_thresholds(made):
    reducer = create("mustdrop_prefill", mean_threshold=0.05, max_threshold=0.3, key_share=0.0)
    tokens = made(reducer)
    for image in range(3):
        rows = tokens.signals["text_rows"][image][tokens.signals["text_mask"][image]].double()
        total = rows.sum(0)
        stays = (total >= 0.05 * total.sum()) | (rows.amax(0) >= 0.3)
        count = int(stays.sum())
        assert 0 < count < 24
        assert reducer(tokens, count).kept_indices[image].tolist() == stays.nonzero()[:, 0].tolist()


def test_mustdrop_prefill_never_drops_the_key_set(made):
    """The 8 % of the image with the most CLS attention, 4 of 48; after a stage they are still the same."""
    reducer = create("mustdrop_prefill")
    tokens = made(reducer, grid=(1, 6, 8))
    for image, row in enumerate(tokens.signals["cls@-1"].tolist()):
        key = descending(row)[:4]
        tokens.signals["text_rows"][image][:, key] = 0
    got = reducer(tokens, 20).kept_indices
    for image, row in enumerate(tokens.signals["cls@-1"].tolist()):
        assert set(descending(row)[:4]) <= set(got[image].tolist())
    index = got[..., None].expand(-1, -1, 6)
    rows = tokens.signals["text_rows"].gather(2, got[:, None].expand(-1, 5, -1))
    later = VisualTokens(
        tokens.features.gather(1, index), (1, 1, 20),
        {**tokens.signals, "text_rows": rows, "cls@-1": tokens.signals["cls@-1"].gather(1, got)},
        layer=7, course=Course(32, 48, 5, torch.zeros(3)),
    )  # fmt: skip
    last = got.gather(1, reducer(later, 5).kept_indices)
    for image, row in enumerate(tokens.signals["cls@-1"].tolist()):
        assert set(descending(row)[:4]) <= set(last[image].tolist())


def test_sparsevlm_asks_only_words_that_see_the_picture(made):
    """Two words stand before it; of the others one looks at more than their mean, and it looks at token 0."""
    tokens = made(create("sparsevlm"), batch=1, grid=(1, 1, 2))
    tokens.signals["text_rows"] = torch.tensor([[[0.0, 0], [0, 0], [0.30, 0.10], [0, 0.25]]])
    tokens.signals["text_mask"] = torch.ones(1, 4, dtype=torch.bool)
    assert create("sparsevlm")(tokens, 1).scores.argmax(-1).tolist() == [0]


@pytest.mark.parametrize("keep", [3, 12, 20])
def test_sparsevlm_keeps_the_judged_and_recycles_into_means(keep, made):
    reducer = create("sparsevlm")
    tokens = made(reducer, grid=(1, 6, 8))
    reduction = reducer(tokens, keep)
    for image in range(3):
        rows = tokens.signals["text_rows"][image][tokens.signals["text_mask"][image]].double()
        share = rows.sum(-1)
        judges = rows[share > share[share > 0].mean()] if (share > share.mean()).any() else rows
        order = descending(judges.mean(0).tolist())
        kept = next(n for n in range(keep, -1, -1) if n + (int(0.3 * (48 - n)) + 1) // 10 + 1 <= keep)
        recycled = order[kept : kept + int(0.3 * (48 - kept)) + 1]
        kept_indices = reduction.kept_indices[image].tolist()
        assert set(order[:kept]) <= set(kept_indices)
        assert set(kept_indices) <= set(order[:kept] + recycled)
        for number, anchor in enumerate(kept_indices):
            members = (reduction.assignment[image] == number).nonzero()[:, 0].tolist()
            assert anchor in members
            assert members == [anchor] if anchor in order[:kept] else set(members) <= set(recycled)
            torch.testing.assert_close(reduction.features[image, number], tokens.features[image, members].mean(0))
        assert int((reduction.assignment[image] >= 0).sum()) == kept + len(recycled)


def test_visiondrop_is_visionzip_on_hidden_states(made):
    """Ranked by what visual tokens attend to in the decoder, contextual tokens added as in the official code."""
    tokens = made(create("visiondrop"))
    twice = torch.cat([tokens.features, tokens.features], -1)  # the mean of two equal heads
    signals = {"cls": tokens.signals["image_rows"].mean(1), "keys": twice}
    other = create("visionzip", heads=2, parity="official")(VisualTokens(tokens.features, tokens.grid, signals), 9)
    got = create("visiondrop")(tokens, 9)
    assert (
        got.kept_indices.tolist()
        != create("visionzip")(
            VisualTokens(tokens.features, tokens.grid, {"cls": -signals["cls"], "keys": twice}), 9
        ).kept_indices.tolist()
    )
    assert torch.equal(got.kept_indices, other.kept_indices)
    assert torch.equal(got.features, other.features)
