"""``train`` end to end on the tiny backbone: from a JSON-lines file to a plug-in that predicts, and what it refuses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.commands.predict import predict
from lit_reduce.distill.export import machine, plugin_config, write_table
from lit_reduce.distill.initial import initial_reducer
from lit_reduce.distill.train import train
from lit_reduce.errors import UserError
from lit_reduce.plugin import load_plugin, save_plugin
from lit_reduce.settings import BackboneSettings, ReducerSettings
from lit_reduce.settings.predict import PredictSettings
from lit_reduce.settings.train import DataSettings, TrainSettings


@pytest.fixture
def chosen(tiny_folder: Path, tmp_path: Path) -> TrainSettings:
    """Four small pictures, one to validate on; half of the questions have no answer."""
    generator = torch.Generator().manual_seed(4)
    for i in range(4):
        pixels = torch.randint(0, 256, (24 + 6 * i, 30, 3), generator=generator).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": prompt} for i in range(4) for prompt in ("what is red ?", "is it big ?")]
    for row in rows[::2]:
        row["answer"] = "w40 w41"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    data = DataSettings(str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), cache=str(tmp_path / "cache"))
    options = {"width": 16, "heads": 2, "layers": 1}
    return TrainSettings(
        BackboneSettings(str(tiny_folder)), ReducerSettings("covipal", options), data, output=str(tmp_path / "out"),
        budgets=[4, 12], val_budgets=[6], steps=4, guide_steps=2, pictures=2, turns=2, warmup=1, val_every=4,
        save_every=2, accelerator="cpu", table_budgets=[192, 9, 4], baselines=["grid"], table_batch=4, runs=1,
    )  # fmt: skip


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_follows_the_processor_and_is_written_down(
    chosen: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lit_reduce.distill.checks.fast_in_bfloat16", lambda device: fast)
    monkeypatch.setattr("lit_reduce.distill.train.fit", lambda chosen, *_: seen.append(chosen.precision) or 1 / 0)
    for precision in ("auto", "64-true"):
        with pytest.raises(ZeroDivisionError):
            train(replace(chosen, precision=precision))
        assert f"precision: {seen[-1]}\n" in (tmp_path / "out" / "settings.yaml").read_text()
    assert seen == [expected, "64-true"]


def test_from_questions_to_a_plug_in_that_predicts(
    chosen: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(chosen)
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert "| grid |" in said.replace("  ", " ") or "grid" in said
    table = json.loads((out / "table.json").read_text())
    found = {(e["reducer"], e["keep"]) for e in table["scores"]}
    assert found == {("all tokens", None), *((name, k) for name in ("covipal", "grid") for k in (9, 4))}
    assert all((out / name).is_file() for name in ("table.md", "table.png", "settings.yaml", "last.ckpt"))
    assert "width: 16" in (out / "settings.yaml").read_text()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4

    assert sorted(path.name for path in (out / "plugin").iterdir()) == [
        "README.md", "reducer.safetensors", "reducer_config.json",
    ]  # fmt: skip
    reducer, config = load_plugin(out / "plugin")
    assert (config.reducer, config.budgets, config.positions) == ("covipal", [4, 12], "keep")
    assert config.options == {"hidden_size": 32, "width": 16, "heads": 2, "layers": 1, "summary": 0}
    assert set(config.metrics["accuracy"]) == {"all", "9", "4"}
    # What is exported is the moving average of the last step, to the bit.
    saved = torch.load(out / "last.ckpt", weights_only=True)
    (average,) = [state["average"] for name, state in saved["callbacks"].items() if "MovingAverage" in name]
    for name, weight in reducer.state_dict().items():
        assert torch.equal(weight, average[name])
    assert any(not torch.equal(average[name], saved["state_dict"][f"reducer.{name}"]) for name in average)

    ask = PredictSettings(
        chosen.backbone, ReducerSettings(str(out / "plugin")), keep=9, image=str(tmp_path / "0.png"),
        prompt="what is red ?", json=True, max_new_tokens=2, runs=1,
    )  # fmt: skip
    predict(ask)
    answered = json.loads(capsys.readouterr().out)
    assert (answered["visual_tokens"], answered["kept_tokens"]) == (36, 9)


def test_training_begins_with_the_weights_of_a_plug_in(
    chosen: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, fresh = saved(chosen, tmp_path, width=16), initial_reducer(replace(chosen, seed=5), load_tiny(chosen))
    seen: list[Any] = []
    monkeypatch.setattr("lit_reduce.distill.train.fit", lambda *given: seen.append(given[2]) or 1 / 0)
    options = chosen.reducer.options | {"summary": 2}
    with pytest.raises(ZeroDivisionError):
        train(replace(chosen, init_from=start, reducer=ReducerSettings("covipal", options)))
    begun, weights = seen[0].state_dict(), load_plugin(start)[0].state_dict()
    assert set(begun) - set(weights) == {"rest"}, "which that one lacks"
    assert all(torch.equal(begun[name], x) for name, x in weights.items())
    assert any(not torch.equal(fresh.state_dict()[name], x) for name, x in weights.items())


def test_weights_that_are_not_named_stay(chosen: TrainSettings, tmp_path: Path) -> None:
    start = saved(chosen, tmp_path, width=16)
    options = chosen.reducer.options | {"summary": 2}
    again = replace(
        chosen, init_from=start, trainable=["rest"], guide_steps=0, table_budgets=[], budgets=[12, 12],
        reducer=ReducerSettings("covipal", options),
    )  # fmt: skip
    train(again)
    train(replace(again, learning_rate=1e-2, output=str(tmp_path / "faster")))
    slow, fast = (load_plugin(tmp_path / name / "plugin")[0].state_dict() for name in ("out", "faster"))
    assert all(torch.equal(slow[name], x) for name, x in load_plugin(start)[0].state_dict().items())
    assert [name for name, x in slow.items() if not torch.equal(fast[name], x)] == ["rest"]
    with pytest.raises(UserError, match="another setting of trainable"):
        train(replace(again, trainable=["rest", "kinds"], steps=6))
    parts = initial_reducer(replace(chosen, trainable=["blocks.0.look", "kinds"]), load_tiny(chosen))
    free = {name for name, weight in parts.named_parameters() if weight.requires_grad}
    assert free == {name for name, _ in parts.named_parameters() if name.startswith(("blocks.0.look.", "kinds"))}


def load_tiny(chosen: TrainSettings) -> Backbone:
    return load_backbone(chosen.backbone.name, device="cpu")


def saved(chosen: TrainSettings, folder: Path, name: str = "covipal", **options: Any) -> str:
    """A plug-in with weights of its own."""
    sizes = {"heads": 2, "layers": 1} if name == "covipal" else {"heads": 2}
    other = replace(chosen, seed=9, reducer=ReducerSettings(name, sizes | options))
    backbone = load_tiny(chosen)
    torch.manual_seed(9)
    reducer = initial_reducer(other, backbone)
    save_plugin(folder / "begun", reducer, plugin_config(other, backbone, reducer))
    return str(folder / "begun")


def test_the_table_can_be_made_later_and_says_what_computed(chosen: TrainSettings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(replace(chosen, table_budgets=[]))
    reducer, config = load_plugin(out / "plugin")
    assert not (out / "table.json").exists()
    assert config.metrics == {"trained_on": machine(torch.device("cpu"))}
    assert "4 steps of 4 questions, seed 0).\n" in (out / "plugin" / "README.md").read_text()
    config.metrics["trained_on"] = "a far machine"
    write_table(chosen, load_backbone(chosen.backbone.name), reducer, config, out, out / "plugin")
    after, told = load_plugin(out / "plugin")
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in reducer.state_dict().items())
    assert set(told.metrics["accuracy"]) == {"all", "9", "4"}
    card = (out / "plugin" / "README.md").read_text()
    assert "- trained_on: a far machine\n" in card
    assert f"Times: {machine(torch.device('cpu'))}, one question" in card


def test_a_learning_rate_is_found_without_training(
    chosen: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(chosen, lr_find=True))
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert said.startswith("learning rate")
    assert "lr_find.png" in said.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["lr_find.png", "settings.yaml"]


BAD: dict[str, tuple[Callable[[TrainSettings, Path], Any], str]] = {
    "no steps": (lambda s, _: replace(s, steps=0), "steps=0"),
    "no budget": (lambda s, _: replace(s, budgets=[]), "budgets="),
    "a budget of nothing": (lambda s, _: replace(s, budgets=[0, 4]), "budgets="),
    "no validation budget": (lambda s, _: replace(s, val_budgets=[]), "val_budgets"),
    "a validation budget of nothing": (lambda s, _: replace(s, val_budgets=[0]), "val_budgets"),
    "a validation budget above the count": (lambda s, _: replace(s, val_budgets=[64]), "36 visual tokens"),
    "a table budget of nothing": (lambda s, _: replace(s, table_budgets=[0]), "table_budgets"),
    "a hard gate": (lambda s, _: replace(s, tau=0.0), "tau"),
    "unknown rows": (lambda s, _: replace(s, guide_rows="image"), "guide_rows=image"),
    "too few weights": (lambda s, _: replace(s, budget_weights=[1.0]), "budget_weights"),
    "a negative weight": (lambda s, _: replace(s, budget_weights=[1.0, -1.0]), "budget_weights"),
    "a curriculum beyond the end": (lambda s, _: replace(s, curriculum=1.5), "curriculum=1.5"),
    "an unknown gate": (lambda s, _: replace(s, gate="garden"), "use exact, concrete, noise"),
    "softness of nothing": (lambda s, _: replace(s, relax=[1.0, 0.0]), "relax="),
    "layers that cannot be run twice": (
        lambda s, _: replace(s, checkpointing=True, reducer=ReducerSettings("mod")), "mod acts inside the language",
    ),
    "unknown positions": (lambda s, _: replace(s, positions="new"), "positions=new"),
    "unknown logger": (lambda s, _: replace(s, logger="paper"), "logger=paper"),
    "unknown precision": (lambda s, _: replace(s, precision="31"), "precision=31"),
    "a layer too many": (lambda s, _: replace(s, guide_layers=[5]), "layers 0 to 4"),
    "nothing to train": (lambda s, _: replace(s, reducer=ReducerSettings("grid")), "nothing to train"),
    "a misspelt reducer": (lambda s, _: replace(s, reducer=ReducerSettings("covipol")), "did you mean 'covipal'"),
    "a misspelt option": (
        lambda s, _: replace(s, reducer=ReducerSettings("covipal", {"widht": 3})), "did you mean 'width'",
    ),
    "heads that do not divide": (
        lambda s, _: replace(s, reducer=ReducerSettings("covipal", {"width": 9, "heads": 2})), "multiple of heads",
    ),
    "a baseline to be trained": (lambda s, _: replace(s, baselines=["covipal"]), "baseline covipal"),
    "a missing file": (lambda s, _: replace(s, data=DataSettings("none.jsonl")), "none.jsonl does not exist"),
    "one picture": (lambda s, p: replace(s, data=DataSettings(one(p))), "one picture"),
    "a missing backbone": (lambda s, p: replace(s, backbone=BackboneSettings(str(p / "none"))), "no backbone"),
    "an output below a file": (lambda s, p: replace(s, output=str(p / "0.png" / "out")), "0.png"),
    "nothing to begin with": (lambda s, p: replace(s, init_from=str(p / "none")), "none"),
    "the start of another method": (
        lambda s, p: replace(s, init_from=saved(s, p, "packer", width=16)),
        "is of packer, but covipal is to be trained",
    ),
    "a start of another width": (lambda s, p: replace(s, init_from=saved(s, p, width=8)), "give its options"),
    "a start with more": (
        lambda s, p: replace(s, init_from=saved(s, p, width=16, summary=2)), "rest [2, 32] where there is",
    ),
    "nothing that trains": (lambda s, _: replace(s, trainable=[]), "has no weights ''"),
    "weights that are not there": (
        lambda s, _: replace(s, trainable=["rest"]), "has no weights 'rest' with these options",
    ),
    "a damaged checkpoint": (lambda s, p: checkpoint(s, p, b"half"), "damaged"),
    "a foreign checkpoint": (lambda s, p: checkpoint(s, p, None), "another reducer"),
}  # fmt: skip


def one(folder: Path) -> str:
    (folder / "one.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "what ?"}))
    return str(folder / "one.jsonl")


def checkpoint(chosen: TrainSettings, folder: Path, content: bytes | None) -> TrainSettings:
    (folder / "out").mkdir()
    path = folder / "out" / "last.ckpt"
    if content is None:
        torch.save({"state_dict": {"reducer.weight": torch.zeros(2)}}, path)
    else:
        path.write_bytes(content)
    return chosen


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_training(chosen: TrainSettings, tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train(change(chosen, tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "plugin").exists()
