"""The table of trained reducers: seeds together, what is missing in its place, nothing asked twice."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import noise
from PIL import Image

from lit_reduce.backbones import load_backbone
from lit_reduce.errors import UserError
from lit_reduce.evaluate import evaluator as suite
from lit_reduce.evaluate.bootstrap import ratio_interval
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Results, Score
from lit_reduce.evaluate.table import TableSettings, table
from lit_reduce.plugin import FORMAT_VERSION, PluginConfig, create_for, save_plugin
from lit_reduce.report.pareto import frontier, pareto, points
from lit_reduce.report.seeds import cell, markdown, missed, ranked, summary
from lit_reduce.settings import BackboneSettings
from lit_reduce.version import __version__


def plugin(folder: Path, tiny_folder: Path, name: str, seed: int) -> None:
    identity = load_backbone(str(tiny_folder)).identity
    torch.manual_seed(seed)
    reducer = create_for(identity, name, {"width": 16, "heads": 2})
    for weight in reducer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    config = PluginConfig(
        format_version=FORMAT_VERSION, reducer=name, options=dict(vars(reducer.config)), backbone=identity,
        budgets=[4, 9], positions="keep", library_version=__version__,
    )  # fmt: skip
    save_plugin(folder, reducer, config)


@pytest.fixture
def chosen(tiny_folder: Path, tmp_path: Path) -> Callable[..., TableSettings]:
    for index in range(2):
        noise(index, 24, 24).save(tmp_path / f"{index}.png")
    rows = [
        {"image": f"{i % 2}.png", "prompt": f"what is w{20 + i} ?", "answer": f"w{3 * i}", "family": "ab"[i // 3]}
        for i in range(6)
    ]
    backbone = load_backbone(str(tiny_folder))
    for i, row in enumerate(rows[:4]):  # what the backbone says itself, so that there is something to lose
        inputs = backbone.prepare([Image.open(tmp_path / row["image"])], [row["prompt"]])
        said = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        rows[i]["answer"] = backbone.decode(said, inputs)[0] or "w1"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plugins = tmp_path / "plugins"
    plugin(plugins / "covipal", tiny_folder, "covipal", 0)
    plugin(plugins / "covipal-seed1", tiny_folder, "covipal", 1)
    plugin(plugins / "packer", tiny_folder, "packer", 2)

    def make(**changed: Any) -> TableSettings:
        made = TableSettings(BackboneSettings(str(tiny_folder)), [9, 4], str(tmp_path / "rows.jsonl"))
        made.plugins, made.methods, made.yardsticks = str(plugins), ["covipal", "packer", "atp"], ["grid", "fastv"]
        made.out, made.answers = str(tmp_path / "docs" / "table.json"), str(tmp_path / "answers")
        made.runs, made.max_new_tokens, made.batch_size = 2, 1, 4
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    return make


def test_one_command_scores_counts_and_times(chosen: Callable[..., TableSettings], tmp_path: Path, capsys: Any) -> None:
    table(chosen())
    said = capsys.readouterr().out
    docs = tmp_path / "docs"
    assert {path.name for path in docs.iterdir()} == {f"table.{end}" for end in ("json", "md", "png", "settings.yaml")}
    assert (docs / "table.md").read_text() in said
    report = json.loads((docs / "table.json").read_text())
    assert list(report["lines"]) == ["covipal", "packer", "atp", "grid", "fastv"]
    covipal = report["lines"]["covipal"]
    assert covipal["plans"] == ["covipal", "covipal-seed1"]
    weights = tmp_path / "plugins" / "covipal" / "reducer.safetensors"
    assert covipal["bytes"] == weights.stat().st_size
    assert covipal["parameters"] * 4 < covipal["bytes"] < covipal["parameters"] * 4 + 20_000
    assert covipal["budgets"]["9"]["seeds"] == 2
    whole = report["costs"][ALL_TOKENS]["all"]
    for name in ("covipal", "packer", "grid", "fastv"):
        for keep in ("9", "4"):
            cost = report["costs"][name][keep]
            assert cost["flops"]["prefill"] < whole["flops"]["prefill"]
            assert (cost["flops"]["reducer"] > 0) == (name in ("covipal", "packer"))
            assert cost["first_token_ms"]["median"] > cost["prefill_ms"]["median"] > 0
    assert "no plug-in at" in report["lines"]["atp"]["budgets"]["9"]["error"]
    text = (docs / "table.md").read_text()
    assert "| atp | 0 | - | missing | missing |" in text
    assert "- atp: " in text
    with Image.open(docs / "table.png") as picture:
        assert picture.size == (1536, 832)


def test_nothing_is_asked_twice_and_a_further_plug_in_alone(
    chosen: Callable[..., TableSettings], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(chosen(runs=0))
    before = json.loads((tmp_path / "docs" / "table.json").read_text())
    asked: list[str] = []
    real = suite.generate

    def watched(backbone: Any, inputs: Any, plan: Any, *rest: Any) -> Any:
        asked.append("all" if plan.reducer is None else plan.reducer.name)
        return real(backbone, inputs, plan, *rest)

    monkeypatch.setattr(suite, "generate", watched)
    table(chosen(runs=0))
    assert asked == []
    again = json.loads((tmp_path / "docs" / "table.json").read_text())
    assert again["lines"] == before["lines"]
    plugin(tmp_path / "plugins" / "packer-seed1", tiny_folder, "packer", 7)
    table(chosen(runs=0))
    assert set(asked) == {"packer"}
    more = json.loads((tmp_path / "docs" / "table.json").read_text())
    assert more["lines"]["covipal"] == before["lines"]["covipal"]
    assert more["lines"]["packer"]["budgets"]["9"]["seeds"] == 2
    assert len(more["lines"]["packer"]["budgets"]["9"]["each"]) == 2
    plugin(tmp_path / "plugins" / "packer-seed1", tiny_folder, "packer", 8)  # trained anew: asked anew
    asked.clear()
    table(chosen(runs=0))
    assert set(asked) == {"packer"}


def test_what_fails_is_told_and_tried_again(
    chosen: Callable[..., TableSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_reduce.reducers.grid import GridReducer

    (tmp_path / "plugins" / "packer" / "reducer.safetensors").write_bytes(b"torn")
    real = GridReducer.reduce

    def breaks(self: Any, tokens: Any, keep: int) -> Any:
        raise RuntimeError("no grid today")

    monkeypatch.setattr(GridReducer, "reduce", breaks)
    table(chosen(runs=0))
    report = json.loads((tmp_path / "docs" / "table.json").read_text())
    text = (tmp_path / "docs" / "table.md").read_text()
    assert report["lines"]["grid"]["budgets"]["9"]["error"] == "RuntimeError: no grid today"
    assert "reducer.safetensors" in report["lines"]["packer"]["budgets"]["4"]["error"]
    assert "- grid: RuntimeError: no grid today\n" in text
    assert "| grid |  | 0 | failed | failed |" in text
    monkeypatch.setattr(GridReducer, "reduce", real)
    table(chosen(runs=0))
    assert "grid: " not in (tmp_path / "docs" / "table.md").read_text()
    with pytest.raises(UserError, match="two lines for packer"):
        table(chosen(methods=["packer", "packer"]))
    with pytest.raises(UserError, match="clock=sun"):
        table(chosen(clock="sun"))
    with pytest.raises(UserError, match="unknown reducer"):
        table(chosen(yardsticks=["gird"]))


def test_a_budget_that_fails_costs_one_question(
    chosen: Callable[..., TableSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_reduce.reducers.grid import GridReducer

    asked: list[int] = []
    real = GridReducer.reduce

    def few(self: Any, tokens: Any, keep: int) -> Any:
        asked.append(keep)
        if keep > 4:
            raise RuntimeError("4 at most")
        return real(self, tokens, keep)

    monkeypatch.setattr(GridReducer, "reduce", few)
    table(chosen(runs=0))
    budgets = json.loads((tmp_path / "docs" / "table.json").read_text())["lines"]["grid"]["budgets"]
    assert budgets["9"]["error"] == "RuntimeError: 4 at most"
    assert budgets["4"]["seeds"] == 1
    assert asked.count(9) == 1
    asked.clear()
    table(chosen(runs=0))  # what succeeded is kept, what failed is tried on one question
    assert asked == [9, 4]  # the latter to count its FLOPs
    assert json.loads((tmp_path / "docs" / "table.json").read_text())["lines"]["grid"]["budgets"] == budgets
    monkeypatch.setattr(GridReducer, "reduce", real)
    table(chosen(runs=0))
    assert json.loads((tmp_path / "docs" / "table.json").read_text())["lines"]["grid"]["budgets"]["9"]["seeds"] == 1


def made() -> Results:
    whole = Score(ALL_TOKENS, None, 36, [1.0, 1.0, 1.0, 0.0])
    scores = [
        Score("a", 9, 9.0, [1.0, 1.0, 0.0, 0.0]),
        Score("a-seed1", 9, 8.0, [1.0, 1.0, 1.0, 1.0]),
        Score("a-seed2", 9, error="torn"),
        Score("b", 9, 9.0, [0.0, 0.0, 1.0, 0.0]),
    ]
    return Results("tiny", 4, 36, [whole, *scores], ["x", "x", "y", "y"])


LINES: dict[str, Any] = {
    "b": {"trained": False, "plans": ["b"]},
    "a": {"trained": True, "plans": ["a", "a-seed1", "a-seed2"], "parameters": 12000, "bytes": 50_000, "errors": {}},
    "c": {"trained": True, "plans": [], "errors": {"c": "no plug-in at c"}},
}


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    found = cell(made(), LINES["a"], 9)
    assert (found["seeds"], found["kept_tokens"], found["errors"]) == (2, 8.5, {"a-seed2": "torn"})
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["each"] == pytest.approx([2 / 3, 4 / 3])
    assert found["relative"] == pytest.approx(1.0)
    assert found["spread"] == pytest.approx(statistics.stdev([2 / 3, 4 / 3]))
    assert found["families"] == {"x": 1.0, "y": 0.5}
    mean, whole = torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert (found["relative_low"], found["relative_high"]) == ratio_interval(mean, whole)
    report = summary(made(), LINES, [9]) | {"costs": {ALL_TOKENS: {"all": {}}}}
    assert ranked(report) == ["a", "c", "b"]
    text = markdown(report)
    assert "| a | 3 | 12 k, 0.1 MB | **100.0** [" in text
    assert "± 47.1 |" in text
    assert "| b |  | 0 | 33.3 [" in text
    assert missed(report) == ["a-seed2: torn", "c: no plug-in at c"]


def test_the_frontier_and_the_picture(tmp_path: Path) -> None:
    assert frontier([(3, 90), (1, 80), (2, 70), (3, 95), (4, 95)]) == [(1, 80), (3, 95)]
    report = summary(made(), LINES, [9])
    time = {"median": 20.0, "low": 19.0, "high": 22.0}
    report["costs"] = {"a": {"9": {"first_token_ms": time}}, ALL_TOKENS: {"all": {"first_token_ms": time}}}
    assert points(report) == {"a": [(20.0, pytest.approx(100.0))]}
    pareto(report, tmp_path / "a.png")
    report["costs"] = {ALL_TOKENS: {"all": {}}}  # nothing was timed
    pareto(report, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
