"""The store of answers: found again by what was asked of whom, whatever happened in between."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import noise

from lit_reduce.backbones import Backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate import evaluator
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.inference.answer_store import AnswerStore, question_digest
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.reducer import create

GRID = ReducerSpec(create("grid"), 9)
ROWS = [Row(f"what is w{20 + i} ?", noise(i % 2, 24, 24), "red", source=f"{i}") for i in range(4)]
ANSWERS = [{"answer": f"w{i} \u2028", "kept": 9} for i in range(4)]


def test_another_process_finds_what_was_added(tiny: Backbone, tmp_path: Path) -> None:
    AnswerStore(tmp_path / "a", tiny, 3).add("grid at 9", GRID, ROWS[:3], ANSWERS[:3])
    again = AnswerStore(tmp_path / "a", tiny, 3)
    assert again.find("grid at 9", ReducerSpec(create("grid"), 9), ROWS[1:3]) == ANSWERS[1:3]
    assert again.find("grid at 9", GRID, ROWS) is None  # one of them is missing
    again.add("grid at 9", GRID, ROWS, ANSWERS)
    assert again.path("grid at 9", GRID).read_bytes().count(b"\n") == 4
    assert again.find("grid at 9", GRID, ROWS[::-1]) == ANSWERS[::-1]
    again.remove()
    assert not (tmp_path / "a").exists()


def test_whatever_decides_an_answer_is_part_of_the_name(tiny: Backbone, tmp_path: Path) -> None:
    def path(spec: ReducerSpec, backbone: Backbone = tiny, longest: int = 3) -> Path:
        return AnswerStore(tmp_path, backbone, longest).path("x", spec)

    torch.manual_seed(0)
    trained = create("covipal", hidden_size=32, width=16, heads=2)
    other = create("covipal", hidden_size=32, width=16, heads=2)
    other.load_state_dict(trained.state_dict())
    assert path(ReducerSpec(trained, 9)) == path(ReducerSpec(other, 9))
    with torch.no_grad():
        next(other.parameters()).add_(1e-6)
    foreign = replace(tiny, identity=replace(tiny.identity, hash="0" * 64))
    paths = [
        path(ReducerSpec()), path(GRID), path(replace(GRID, keep=4)), path(replace(GRID, positions="renumber")),
        path(GRID, longest=4), path(GRID, foreign), path(ReducerSpec(create("random"), 9)),
        path(ReducerSpec(create("random", seed=1), 9)), path(ReducerSpec(trained, 9)), path(ReducerSpec(other, 9)),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)


def test_a_question_is_its_picture_and_its_prompt(tiny: Backbone, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "a", tiny, 3)
    file = tmp_path / "0.png"
    noise(0, 24, 24).save(file)
    row = Row("what ?", file, "red", source="0.png")
    store.add("grid at 9", GRID, [row], ANSWERS[:1])
    assert store.find("grid at 9", GRID, [replace(row, answer="blue", id=7, source="elsewhere/0.png")]) == ANSWERS[:1]
    assert store.find("grid at 9", GRID, [replace(row, prompt="who ?")]) is None
    noise(1, 24, 24).save(file)  # another picture under the old name
    assert store.find("grid at 9", GRID, [row]) is None


def test_torn_anywhere_only_torn_lines_are_lost(tiny: Backbone, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, tiny, 3)
    store.add("grid at 9", GRID, ROWS, ANSWERS)
    path = store.path("grid at 9", GRID)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        left = whole[:cut].count(b"\n")
        torn = AnswerStore(tmp_path, tiny, 3)
        assert torn.find("grid at 9", GRID, ROWS[:left]) == (ANSWERS[:left] if left else None)
        torn.add("grid at 9", GRID, ROWS, ANSWERS)
        assert AnswerStore(tmp_path, tiny, 3).find("grid at 9", GRID, ROWS) == ANSWERS


def test_an_evaluation_asks_only_what_is_missing(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    real = evaluator.generate

    def watched(backbone: Any, inputs: Any, spec: ReducerSpec, *rest: Any) -> Any:
        asked.append(("all" if spec.reducer is None else spec.reducer.name, len(inputs["input_ids"])))
        return real(backbone, inputs, spec, *rest)

    monkeypatch.setattr(evaluator, "generate", watched)

    def scores(specs: dict[str, ReducerSpec], rows: list[Row], store: AnswerStore | None) -> list[Any]:
        asked.clear()
        return evaluate(tiny, specs, [9], rows, 2, max_new_tokens=3, store=store).scores

    specs = {"grid": GRID, "pool": ReducerSpec(create("pool"))}
    fresh = scores(specs, ROWS, None)
    assert scores({"grid": GRID}, ROWS[:2], AnswerStore(tmp_path, tiny, 3)) is not None
    assert scores({"grid": GRID}, ROWS, AnswerStore(tmp_path, tiny, 3)) is not None
    assert asked == [("all", 2), ("grid", 2)]
    assert scores(specs, ROWS, AnswerStore(tmp_path, tiny, 3)) == fresh
    assert asked == [("pool", 2), ("pool", 2)]
    assert scores(specs, ROWS, AnswerStore(tmp_path, tiny, 3)) == fresh
    assert asked == []


def test_lines_that_are_no_answers_are_asked_again(tiny: Backbone, tmp_path: Path) -> None:
    path = AnswerStore(tmp_path, tiny, 3).path("x", GRID)
    digest = question_digest(ROWS[0])
    path.write_text(
        f'{{"question": [1]}}\n{{"question": "{digest}"}}\n{{"question": "{digest}", "answer": 3}}\n[]\n0\n'
    )
    store = AnswerStore(tmp_path, tiny, 3)
    assert store.find("x", GRID, ROWS[:1]) is None
    store.add("x", GRID, ROWS[:1], ANSWERS[:1])
    assert AnswerStore(tmp_path, tiny, 3).find("x", GRID, ROWS[:1]) == ANSWERS[:1]


def test_a_pipe_is_no_store(tiny: Backbone, tmp_path: Path) -> None:
    os.mkfifo(AnswerStore(tmp_path, tiny, 3).path("x", GRID))
    with pytest.raises(UserError, match="not a plain file"):
        AnswerStore(tmp_path, tiny, 3).find("x", GRID, ROWS)
