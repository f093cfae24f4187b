"""CoViPAL: what it may look at, what it may cost, and the shapes that it must bear."""

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime.encode import encode
from lit_reduce.tokens import VisualTokens
from lit_reduce_pocket.model import build_model

WIDTH = 24


@pytest.fixture
def covipal() -> Reducer:
    """Weights large enough that everything that is looked at shows in the scores."""
    reducer = create("covipal", hidden_size=WIDTH, width=16, heads=2).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.5, generator=generator)
    return reducer


def make(
    batch: int = 3, rows: int = 3, columns: int = 4, words: int = 6, extra: int = 0, seed: int = 0
) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, words, WIDTH, generator=generator)
    mask = torch.arange(words) < torch.arange(words, words - batch, -1)[:, None]
    features = torch.randn(batch, rows * columns + extra, WIDTH, generator=generator)
    return VisualTokens(features, (1, rows, columns), {"text": text * mask[..., None], "text_mask": mask})


def pick(tokens: VisualTokens, image: int, words: int) -> VisualTokens:
    text, mask = (
        tokens.signals["text"][image : image + 1, :words],
        tokens.signals["text_mask"][image : image + 1, :words],
    )
    return VisualTokens(tokens.features[image : image + 1], tokens.grid, {"text": text, "text_mask": mask})


def test_prompt_padding_has_no_influence(covipal) -> None:
    tokens = make()
    scores = covipal.score(tokens)
    loud = tokens.signals["text"].masked_fill(~tokens.signals["text_mask"][..., None], 1e3)
    louder = VisualTokens(tokens.features, tokens.grid, {**tokens.signals, "text": loud})
    torch.testing.assert_close(covipal.score(louder), scores)
    heard = tokens.signals["text"].clone()
    heard[:, 0] += 1
    changed = VisualTokens(tokens.features, tokens.grid, {**tokens.signals, "text": heard})
    assert ((covipal.score(changed) - scores).abs().amax(1) > 1e-3).all()  # a real word has influence


def test_a_batch_equals_its_images_one_by_one(covipal) -> None:
    tokens = make()
    together, reduced = covipal.score(tokens), covipal(tokens, 5)
    for image in range(3):
        alone = pick(tokens, image, 6 - image)  # with no padding at all
        torch.testing.assert_close(covipal.score(alone)[0], together[image], atol=1e-5, rtol=1e-5)
        assert torch.equal(covipal(alone, 5).kept_indices[0], reduced.kept_indices[image])


def test_it_keeps_the_best_scores_in_raster_order(covipal) -> None:
    tokens = make()
    reduction = covipal(tokens, 4)
    for image in range(3):
        scores = covipal.score(tokens)[image].tolist()
        assert reduction.kept_indices[image].tolist() == sorted(sorted(range(12), key=lambda n: -scores[n])[:4])


def test_image_tokens_see_one_another_and_their_place(covipal) -> None:
    tokens = make()
    scores = covipal.score(tokens)
    other = tokens.features.clone()
    other[:, 0] = -other[:, 0]
    moved = covipal.score(VisualTokens(other, tokens.grid, tokens.signals))
    assert ((moved - scores)[:, 1:].abs().amax(1) > 1e-4).all()
    same = VisualTokens(tokens.features[:, :1].expand(-1, 12, -1), tokens.grid, tokens.signals)
    assert (covipal.score(same).std(1) > 1e-4).all()  # equal tokens differ by place alone
    turned = VisualTokens(tokens.features, (1, 4, 3), tokens.signals)
    assert (covipal.score(turned) - scores).abs().max() > 1e-4


@pytest.mark.parametrize(("rows", "columns", "extra"), [(1, 1, 1), (1, 7, 0), (5, 1, 0), (3, 5, 3), (7, 9, 7)])
def test_odd_grids_and_newline_tokens_work(covipal, rows: int, columns: int, extra: int) -> None:
    tokens = make(rows=rows, columns=columns, extra=extra)
    scores = covipal.score(tokens)
    assert scores.shape == (3, rows * columns + extra)
    assert scores.isfinite().all()
    keep = max(1, scores.shape[1] // 2)
    assert covipal(tokens, keep).kept_indices.shape == (3, keep)


def test_a_width_that_no_table_of_places_fills_works() -> None:
    reducer = create("covipal", hidden_size=WIDTH, width=18, heads=3)
    assert reducer.score(make()).isfinite().all()


def test_a_prompt_without_words_works(covipal) -> None:
    tokens = make()
    empty = {"text": tokens.signals["text"][:, :0], "text_mask": tokens.signals["text_mask"][:, :0]}
    assert covipal.score(VisualTokens(tokens.features, tokens.grid, empty)).isfinite().all()


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="heads"):
        create("covipal", hidden_size=WIDTH, width=30, heads=4)


def test_answers_are_never_seen(tiny, pictures) -> None:
    reducer = create("covipal", hidden_size=32, width=16, heads=2)
    prompt = tiny.prepare([pictures[0]], ["what is the red ?"])
    plain = encode(tiny.model, prompt, reducer.signals)
    expected = reducer.score(plain.tokens([0], reducer.signals))
    for reply in ([20, 21], [40, 41]):
        answer = torch.tensor([reply])
        ids = torch.cat([prompt["input_ids"], answer], 1)
        labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], 1)
        inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        told = encode(tiny.model, {**inputs, "labels": labels}, reducer.signals)
        torch.testing.assert_close(reducer.score(told.tokens([0], reducer.signals)), expected)
        leak = encode(tiny.model, inputs, reducer.signals)
        assert not torch.allclose(reducer.score(leak.tokens([0], reducer.signals)), expected)


def test_its_default_size_is_at_most_a_twentieth_of_pocket() -> None:
    pocket = build_model()
    reducer = create("covipal", hidden_size=pocket.config.text_config.hidden_size)
    assert pocket.config.text_config.hidden_size == 256
    ours = sum(p.numel() for p in reducer.parameters())
    assert ours <= 0.05 * sum(p.numel() for p in pocket.parameters())


def resting(rest: int) -> Reducer:
    reducer = create("covipal", hidden_size=WIDTH, width=16, heads=2, summary=rest).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.5, generator=generator)
    return reducer


@pytest.mark.parametrize(("keep", "summary_count"), [(11, 2), (8, 2), (7, 1), (4, 1), (3, 0)])
def test_some_tokens_of_the_budget_stand_for_all_that_is_dropped(keep: int, summary_count: int) -> None:
    """Against a loop in float64: the mean of what is dropped and a learned vector, in the places of the worst."""
    reducer, tokens = resting(2), make()
    reduction = reducer(tokens, keep)
    assert reduction.kept_indices.shape == (3, keep)
    made = reduction.gather(tokens)
    for image in range(3):
        scores = reducer.score(tokens)[image].tolist()
        ranked = sorted(range(12), key=lambda n: -scores[n])
        best, places = ranked[: keep - summary_count], sorted(ranked[12 - summary_count :])
        assert reduction.kept_indices[image].tolist() == sorted(best + places)
        dropped = [n for n in range(12) if n not in best]
        mean = torch.stack([tokens.features[image, n].double() for n in dropped]).mean(0)
        for place, token in zip(reduction.kept_indices[image].tolist(), made[image], strict=True):
            stands = place in places
            expected = (
                mean + 10 * reducer.rest[places.index(place)].double() if stands else tokens.features[image, place]
            )
            torch.testing.assert_close(token.double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_what_stands_for_the_rest_is_an_option() -> None:
    plain, more = create("covipal", hidden_size=WIDTH), create("covipal", hidden_size=WIDTH, summary=4)
    assert (plain.kind, more.kind) == ("select", "resample")
    assert set(more.state_dict()) - set(plain.state_dict()) == {"rest"}
    assert plain(make(), 5).features is None
    with pytest.raises(UserError, match="summary=-1"):
        create("covipal", hidden_size=WIDTH, summary=-1)
