"""Comparing: one page for all reducers, whatever happens to some of them or to the process."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from noise import noise

from lit_reduce.commands.compare import compare
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate import evaluator as suite
from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.inference.spec_list import find_specs
from lit_reduce.reducers.grid import GridReducer
from lit_reduce.report.gallery import examples_of
from lit_reduce.settings import BackboneSettings
from lit_reduce.settings.compare import CompareSettings

ROWS = 6


@pytest.fixture
def chosen(tiny_folder: Path, tmp_path: Path) -> Callable[..., CompareSettings]:
    """Makes settings for six questions of two kinds about two pictures."""
    for index in range(2):
        noise(index, 24, 24).save(tmp_path / f"{index}.png")
    rows = [
        {"image": f"{i % 2}.png", "prompt": f"what is w{20 + i} ?", "answer": ["red", "w3"], "family": "ab"[i // 3]}
        for i in range(ROWS)
    ]
    rows[0]["prompt"] = "what <b>is</b> red ?"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out: str = "report.html", **changed: Any) -> CompareSettings:
        made = CompareSettings(BackboneSettings(str(tiny_folder)), [9, 4], str(tmp_path / "rows.jsonl"))
        made.out, made.reducers, made.runs, made.max_new_tokens = str(tmp_path / out), ["grid", "fastervlm"], 0, 2
        made.batch_size = 2
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    return make


def scores(path: Path) -> dict[tuple[str, Any], dict[str, Any]]:
    return {(entry["reducer"], entry["keep"]): entry for entry in json.loads(path.read_text())["scores"]}


def test_one_page_with_everything_inside(chosen: Callable[..., CompareSettings], tmp_path: Path) -> None:
    compare(chosen(runs=1, pictures=3))
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("report")}
    assert names == {f"report.{end}" for end in ("html", "json", "md", "png", "rows.jsonl", "settings.yaml")}
    page = (tmp_path / "report.html").read_text()
    assert "<b>is</b>" not in page  # the user's words are shown, not run
    assert "what &lt;b&gt;is&lt;/b&gt; red ?" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 1 + 3 * 3  # the plot; all tokens and two reducers for three questions
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in page
    assert 'class="failed"' not in page
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["families"] == {"a": 3, "b": 3}
    assert report["reducers"]["fastervlm"]["signals"] == ["cls"]
    measured = scores(tmp_path / "report.json")
    assert set(measured) == {(ALL_TOKENS, None), *((n, k) for n in ("grid", "fastervlm") for k in (9, 4))}
    for entry in measured.values():
        assert entry["accuracy"] == pytest.approx((entry["families"]["a"] + entry["families"]["b"]) / 2)
        assert entry["first_token_ms"]["median"] > 0


def test_what_fails_is_a_line_with_its_reason_and_the_others_go_on(
    chosen: Callable[..., CompareSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    compare(chosen("sound.html"))
    calls = []

    def breaks(self: GridReducer, tokens: Any, keep: int) -> Any:
        calls.append(keep)
        if keep == 4 and calls.count(4) == 2:
            raise ZeroDivisionError("of <grid>")
        return real(self, tokens, keep)

    real = GridReducer.reduce
    monkeypatch.setattr(GridReducer, "reduce", breaks)
    compare(chosen(reducers=["grid", "fastervlm", str(tmp_path / "none")], pictures=0))
    measured, sound = scores(tmp_path / "report.json"), scores(tmp_path / "sound.json")
    assert measured["grid", 4] == {"reducer": "grid", "keep": 4, "error": "ZeroDivisionError: of <grid>"}
    for key in (ALL_TOKENS, None), ("grid", 9), ("fastervlm", 9), ("fastervlm", 4):
        assert measured[key] == sound[key]
    assert "no plug-in at" in measured[str(tmp_path / "none"), 9]["error"]
    assert calls.count(4) == 2  # it was not asked again after it had failed
    assert "grid failed at 4: ZeroDivisionError: of &lt;grid&gt;" in (tmp_path / "report.html").read_text()
    assert "grid failed at 4: ZeroDivisionError: of <grid>" in capsys.readouterr().out


def test_a_budget_or_a_signal_that_the_backbone_cannot_give(
    chosen: Callable[..., CompareSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = suite.encode

    def no_cls(model: Any, inputs: Any, signals: frozenset[str], family: Any) -> Any:
        if "cls" in signals:
            raise UserError("this tower has no CLS token")
        return real(model, inputs, signals, family)

    monkeypatch.setattr(suite, "encode", no_cls)
    compare(chosen(keep=[9, 37], pictures=0))
    measured = scores(tmp_path / "report.json")
    assert measured["grid", 9]["kept_tokens"] == 9
    assert measured["fastervlm", 9]["error"] == "this tower has no CLS token"
    assert "only 36 visual tokens" in measured["grid", 37]["error"]


def test_a_killed_run_goes_on(
    chosen: Callable[..., CompareSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(chosen("whole.html"))
    asked: list[int] = []
    real = suite.generate

    def dies(*words: Any) -> Any:
        asked.append(len(words[1]["input_ids"]))
        if len(asked) == 8:  # in the second of three batches, each of which asks five plans
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(suite, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(chosen())
    parts = sorted((tmp_path / "report.part").iterdir())
    assert sorted(part.read_bytes().count(b"\n") for part in parts) == [2, 2, 2, 4, 4]
    asked.clear()
    asked += [0] * 8
    compare(chosen(max_new_tokens=1))  # other settings never continue it
    assert sum(asked) == 5 * ROWS
    assert all(part.is_file() for part in parts)
    asked.clear()
    asked += [0] * 8
    compare(chosen())
    assert sum(asked) == 5 * (ROWS - 2) - 2 * 2  # two plans had answered the second batch already
    assert not (tmp_path / "report.part").exists()
    for end in ("json", "rows.jsonl", "md", "html"):
        assert (tmp_path / f"report.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()


def test_examples_take_the_kinds_in_turn() -> None:
    rows = [Row("?", Path("x"), family=family) for family in "aaabbc"]
    assert examples_of(rows, 5) == [0, 3, 5, 1, 4]
    assert examples_of([Row("?", Path("x"))] * 3, 2) == [0, 1]
    assert examples_of(rows, 0) == []


def test_what_the_list_of_reducers_means(tmp_path: Path) -> None:
    everything, broken = find_specs(["all"], 9)
    assert {"grid", "pool", "divprune"} <= set(everything)
    assert "covipal" not in everything
    assert broken == {}
    plans, broken = find_specs(["random", {"name": "random", "options": {"seed": 3}}, "no/such"], 9)
    assert list(plans) == ["random", "random (seed=3)"]
    assert plans["random (seed=3)"].reducer.config.seed == 3
    assert list(broken) == ["no/such"]
    for entries, message in [
        ([], "names none"),
        (["gridd"], "did you mean 'grid'"),
        (["covipal"], "must be trained"),
        (["none"], "always compared"),
        (["grid", "grid"], "names grid twice"),
        ([{"nam": "grid"}], "give a name"),
        ([{"name": "random", "options": {"sed": 1}}], "did you mean 'seed'"),
    ]:
        with pytest.raises(UserError, match=message):
            find_specs(entries, 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": "report.json"}, "ends in .html"),
        ({"pictures": -1}, "pictures=-1"),
        ({"pictures_keep": 8}, "not among"),
        ({"data": None}, "no data are given"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings(chosen: Callable[..., CompareSettings], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(chosen(**changed))
