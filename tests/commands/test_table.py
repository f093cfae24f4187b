"""The table of trained reducers: seeds together, what is missing in its place, nothing asked twice."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import noise
from PIL import Image

from lit_reduce.backbones import load_backbone
from lit_reduce.commands.table import table
from lit_reduce.errors import UserError
from lit_reduce.evaluate import evaluator as suite
from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.plugin import FORMAT_VERSION, PluginConfig, create_for, save_plugin
from lit_reduce.settings import BackboneSettings
from lit_reduce.settings.table import TableSettings
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


def scores(path: Path) -> dict[tuple[str, Any], dict[str, Any]]:
    return {(entry["reducer"], entry["keep"]): entry for entry in json.loads(path.read_text())["scores"]}


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
        made.plugins, made.methods, made.baselines = str(plugins), ["covipal", "packer", "atp"], ["grid", "fastv"]
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
    assert list(report["reducers"]) == ["covipal", "packer", "atp", "grid", "fastv"]
    covipal = report["reducers"]["covipal"]
    assert covipal["seeds"] == ["covipal", "covipal-seed1"]
    weights = tmp_path / "plugins" / "covipal" / "reducer.safetensors"
    assert covipal["bytes"] == weights.stat().st_size
    assert covipal["parameters"] * 4 < covipal["bytes"] < covipal["parameters"] * 4 + 20_000
    found = scores(docs / "table.json")
    assert found["covipal", 9]["seeds"] == 2
    whole = found[ALL_TOKENS, None]
    for name in ("covipal", "packer", "grid", "fastv"):
        for keep in (9, 4):
            entry = found[name, keep]
            assert entry["flops"]["prefill"] < whole["flops"]["prefill"]
            assert (entry["flops"]["reducer"] > 0) == (name in ("covipal", "packer"))
            assert entry["first_token_ms"]["median"] > entry["prefill_ms"]["median"] > 0
    assert "no plug-in at" in found["atp", 9]["error"]
    text = (docs / "table.md").read_text()
    assert re.search(r"\| atp +\| missing +\| missing +\|", text)
    assert "- atp failed at 9, 4: no plug-in at" in text
    with Image.open(docs / "table.png") as picture:
        assert picture.size == (2000, 768)


def test_nothing_is_asked_twice_and_a_further_plug_in_alone(
    chosen: Callable[..., TableSettings], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(chosen(runs=0))
    before = scores(tmp_path / "docs" / "table.json")
    asked: list[str] = []
    real = suite.generate

    def watched(backbone: Any, inputs: Any, plan: Any, *rest: Any) -> Any:
        asked.append("all" if plan.reducer is None else plan.reducer.name)
        return real(backbone, inputs, plan, *rest)

    monkeypatch.setattr(suite, "generate", watched)
    table(chosen(runs=0))
    assert asked == []
    assert scores(tmp_path / "docs" / "table.json") == before
    plugin(tmp_path / "plugins" / "packer-seed1", tiny_folder, "packer", 7)
    table(chosen(runs=0))
    assert set(asked) == {"packer"}
    more = scores(tmp_path / "docs" / "table.json")
    assert more["covipal", 9] == before["covipal", 9]
    assert more["packer", 9]["seeds"] == len(more["packer", 9]["each"]) == 2
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
    found = scores(tmp_path / "docs" / "table.json")
    text = (tmp_path / "docs" / "table.md").read_text()
    assert found["grid", 9]["error"] == "RuntimeError: no grid today"
    assert "reducer.safetensors" in found["packer", 4]["error"]
    assert "- grid failed at 9, 4: RuntimeError: no grid today\n" in text
    assert re.search(r"\| grid +\| failed +\| failed +\|", text)
    monkeypatch.setattr(GridReducer, "reduce", real)
    table(chosen(runs=0))
    assert "grid failed" not in (tmp_path / "docs" / "table.md").read_text()
    with pytest.raises(UserError, match="two lines for packer"):
        table(chosen(methods=["packer", "packer"]))
    with pytest.raises(UserError, match="clock=sun"):
        table(chosen(clock="sun"))
    with pytest.raises(UserError, match="unknown reducer"):
        table(chosen(baselines=["gird"]))


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
    found = scores(tmp_path / "docs" / "table.json")
    assert found["grid", 9]["error"] == "RuntimeError: 4 at most"
    assert found["grid", 4]["seeds"] == 1
    assert asked.count(9) == 1
    asked.clear()
    table(chosen(runs=0))  # what succeeded is kept, what failed is tried on one question
    assert asked == [9, 4]  # the latter to count its FLOPs
    assert scores(tmp_path / "docs" / "table.json") == found
    monkeypatch.setattr(GridReducer, "reduce", real)
    table(chosen(runs=0))
    assert scores(tmp_path / "docs" / "table.json")["grid", 9]["seeds"] == 1
