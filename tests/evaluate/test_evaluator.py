"""The suite: the scores that answering one by one would give, and times that belong to the right plan."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark import latency
from lit_reduce.benchmark.latency import Spread, Timing, first_token
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.inference.spec import ReducerSpec, generate
from lit_reduce.reducer import create

PLANS = {"grid": ReducerSpec(create("grid")), "cls": ReducerSpec(create("fastervlm"))}
PROMPTS = ["what is red ?", "the big ?", "is the red big here ?", "w20 w21", "what ?"]


@pytest.fixture
def rows(tiny: Backbone, pictures: list[Image.Image]) -> list[Row]:
    """Questions whose accepted answer is what the plain model says; the last is made wrong."""
    made = []
    for index, prompt in enumerate(PROMPTS):
        picture = pictures[index % 3]
        (answer,), _ = generate(tiny, tiny.prepare([picture], [prompt]), ReducerSpec(), 3)
        made.append(Row(prompt, picture, answer if index < 4 else "never"))
    return made


def test_equals_answering_one_by_one(tiny: Backbone, rows: list[Row]) -> None:
    reducers = {"grid": create("grid"), "cls": create("fastervlm")}
    steps: list[int] = []
    plans = {name: ReducerSpec(reducer) for name, reducer in reducers.items()}
    results = evaluate(tiny, plans, [9, 0.5], rows, batch_size=2, on_batch=steps.append, max_new_tokens=3)
    assert (results.rows, results.tokens, steps) == (5, 36, [2, 2, 1])
    assert results.score(ALL_TOKENS, None).correct == [1, 1, 1, 1, 0]
    assert [(score.reducer, score.keep, score.kept) for score in results.scores] == [
        (ALL_TOKENS, None, 36), ("grid", 9, 9), ("grid", 0.5, 18), ("cls", 9, 9), ("cls", 0.5, 18),
    ]  # fmt: skip
    for name, reducer in reducers.items():
        for keep in (9, 0.5):
            alone = [
                generate(tiny, tiny.prepare([r.open()], [r.prompt]), ReducerSpec(reducer, keep), 3)[0][0] for r in rows
            ]
            score = results.score(name, keep)
            assert score.answers == alone
            expected = [float(answer == row.answer) for answer, row in zip(alone, rows, strict=True)]
            assert score.correct == expected
    answers = {tuple(score.answers) for score in results.scores}
    assert len(answers) == 5  # every plan says something of its own, so the comparison above had something to see


INSIDE = {
    "fastv": {},
    "visiondrop": {},
    "lookm": {},
    "atp": {"hidden_size": 32, "sites": [0.0, 0.4]},
    "mod": {"hidden_size": 32, "depth": 5},
    "voco": {"hidden_size": 32, "depth": 5, "key_size": 16},
    "flexattention": {"hidden_size": 32, "depth": 5, "key_size": 16},
}


def test_one_pass_of_the_tower_serves_all_but_those_inside_it(tiny: Backbone, rows: list[Row]) -> None:
    torch.manual_seed(0)
    plans = PLANS | {name: ReducerSpec(create(name, **options)) for name, options in INSIDE.items()}
    plans |= {"prumerge": ReducerSpec(create("prumerge"))}  # asks for a signal without a row for each token
    for plan in plans.values():
        for weight in plan.reducer.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    calls: list[int] = []
    listener = tiny.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = evaluate(tiny, plans, [12], rows, batch_size=5, max_new_tokens=4)
        assert len(calls) == 2, "with all tokens, and for all plans"
        calls.clear()
        evaluate(tiny, PLANS | {"tome": ReducerSpec(create("tome"))}, [18], rows, batch_size=5, max_new_tokens=1)
        assert len(calls) == 3
    finally:
        listener.remove()
    inputs = tiny.prepare([row.open() for row in rows], [row.prompt for row in rows])
    for name, plan in plans.items():
        texts, logical = generate(tiny, inputs, replace(plan, keep=12), 4)
        assert found.score(name, 12).answers == texts
        assert found.score(name, 12).counts == logical.per_layer
    assert len({tuple(score.answers) for score in found.scores}) > len(plans) // 2


def test_rows_are_taken_lazily_and_need_answers(tiny: Backbone, rows: list[Row]) -> None:
    taken: list[int] = []

    def stream() -> Iterator[Row]:
        for index, row in enumerate(rows):
            taken.append(index)
            yield row

    seen: list[int] = []
    evaluate(tiny, {}, [], stream(), batch_size=1, on_batch=lambda _: seen.append(len(taken)), max_new_tokens=1)
    assert seen == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="without an answer"):
        evaluate(tiny, {}, [], [Row("what ?", rows[0].image)], max_new_tokens=1)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(tiny, {}, [], [])
    with pytest.raises(UserError, match="only 36"):
        evaluate(tiny, {"grid": ReducerSpec(create("grid"))}, [37], rows)


def test_timing_is_measured_for_every_plan(tiny: Backbone, rows: list[Row]) -> None:
    results = evaluate(tiny, {"grid": ReducerSpec(create("grid"))}, [9], rows[:1], max_new_tokens=1, timing_runs=2)
    for score in results.scores:
        assert score.timing is not None
        assert 0 < score.timing.first_token.low <= score.timing.first_token.median <= score.timing.first_token.high
        assert score.timing.runs == 2
        assert (score.timing.reducer is None) == (score.reducer == ALL_TOKENS)


def test_runs_alternate_and_the_first_is_not_counted(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plans = {"a": ReducerSpec(), "b": ReducerSpec(create("grid"), 9)}

    def fake(backbone: Backbone, inputs: object, plan: ReducerSpec) -> tuple[float, float | None]:
        calls.append(next(name for name, known in plans.items() if known is plan))
        turn = (len(calls) - 1) // 2
        return (1000.0 if turn == 0 else 10.0 * turn), (None if plan.reducer is None else float(turn))

    monkeypatch.setattr(latency, "_run", fake)
    timings = first_token(tiny, {}, plans, runs=5)
    assert calls == ["a", "b"] * 6
    assert timings["a"] == Timing(Spread(30.0, 20.0, 40.0), None, 5)
    assert timings["b"] == Timing(Spread(30.0, 20.0, 40.0), Spread(3.0, 2.0, 4.0), 5)


def test_the_reducers_time_is_inside(tiny: Backbone, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    slow = create("grid")
    real = slow.reduce
    monkeypatch.setattr(slow, "reduce", lambda *a: time.sleep(0.1) or real(*a))
    inputs = tiny.prepare([rows[0].open()], [rows[0].prompt])
    timing = first_token(tiny, inputs, {"slow": ReducerSpec(slow, 9)}, runs=1)["slow"]
    assert timing.reducer is not None
    assert 100 <= timing.reducer.median < timing.first_token.median


def test_counts_of_each_question_are_kept_where_they_differ(tiny: Backbone, rows: list[Row]) -> None:
    torch.manual_seed(0)
    reducer = create("atp", hidden_size=32, sites=[0.0, 0.5]).eval()
    for weight in reducer.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    score = evaluate(tiny, {"atp": ReducerSpec(reducer)}, [14], rows, batch_size=2, max_new_tokens=1).score("atp", 14)
    alone = [
        generate(tiny, tiny.prepare([r.open()], [r.prompt]), ReducerSpec(reducer, 14), 1)[1].per_layer for r in rows
    ]
    assert score.counts == pytest.approx([one for (one,) in alone])
    assert len(set(score.counts)) > 1
    assert score.kept == pytest.approx(sum(score.counts) / 5)
