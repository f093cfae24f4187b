"""One question costs one ``generate``; times are measured only when they are asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import noise
from transformers import LlavaForConditionalGeneration

from lit_reduce.backbones import load_backbone
from lit_reduce.commands.predict import predict
from lit_reduce.errors import UserError
from lit_reduce.files import locked
from lit_reduce.inference.answered_with import settings_file
from lit_reduce.plugin import PluginConfig, save_plugin
from lit_reduce.reducer import create
from lit_reduce.settings import BackboneSettings, ReducerSettings, beside, configs_dir, resolve
from lit_reduce.settings.predict import PredictSettings


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> PredictSettings:
    noise(1, 64, 48).save(tmp_path / "a.png")
    return PredictSettings(
        BackboneSettings(str(tiny_folder)), ReducerSettings("fastervlm"), keep=9, image=str(tmp_path / "a.png"),
        prompt="what is red ?", max_new_tokens=3,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The longest answer that each call of ``generate`` was asked for."""
    seen: list[int] = []
    real = LlavaForConditionalGeneration.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["max_new_tokens"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return seen


@pytest.mark.parametrize("reducer", ["none", "fastervlm", "fastv"])
def test_an_answer_costs_one_generate(
    settings: PredictSettings, calls: list[int], capsys: pytest.CaptureFixture[str], reducer: str
) -> None:
    options = {"layer": 1} if reducer == "fastv" else {}
    predict(replace(settings, reducer=ReducerSettings(reducer, options)))
    assert calls == [3]
    assert "not timed; runs=5 times it" in capsys.readouterr().out


def test_json_has_times_only_when_they_were_measured(
    settings: PredictSettings, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert PredictSettings().runs == 0
    predict(replace(settings, json=True))
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["answer", "visual_tokens", "kept_tokens"]
    assert (record["visual_tokens"], record["kept_tokens"], calls) == (36, 9, [3])
    calls.clear()
    predict(replace(settings, json=True, runs=2))
    timed = json.loads(capsys.readouterr().out)
    assert {key: timed[key] for key in record} == record
    assert 0 < timed["reducer_ms"] < timed["ttft_ms"]
    assert timed["ttft_plain_ms"] > 0
    assert calls == [3, *[1] * 6]  # the answer; with and without the reducer, once to warm up and twice counted


def test_runs_below_nothing_are_refused(settings: PredictSettings) -> None:
    with pytest.raises(UserError, match="runs=-1: give 0 or more"):
        predict(replace(settings, runs=-1))


@pytest.fixture
def many(settings: PredictSettings, tmp_path: Path) -> PredictSettings:
    """Four questions, two at a time, asked of a plug-in whose weights a test may change."""
    rows = [{"image": "a.png", "prompt": f"what is w{i} ?"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plugin(tmp_path, settings, 0)
    (tmp_path / "out").mkdir()
    return replace(
        settings, image=None, prompt=None, input=str(tmp_path / "rows.jsonl"), max_new_tokens=2, batch_size=2,
        output=str(tmp_path / "out" / "a.jsonl"), reducer=ReducerSettings(str(tmp_path / "plug")),
    )  # fmt: skip


def plugin(folder: Path, settings: PredictSettings, seed: int) -> None:
    identity = load_backbone(settings.backbone.name, device="cpu").identity
    torch.manual_seed(seed)
    reducer = create("covipal", hidden_size=32, width=16, heads=2, layers=1)
    save_plugin(folder / "plug", reducer, PluginConfig("covipal", {}, identity, [4]))


def half_done(many: PredictSettings) -> bytes:
    """A run of which the last two lines are missing."""
    predict(many)
    output = Path(str(many.output))
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:2]))
    return output.read_bytes()


def test_a_run_goes_on_with_the_same_settings_only(many: PredictSettings, tmp_path: Path) -> None:
    begun, output = half_done(many), Path(str(many.output))
    before = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    others = {"keep": {"keep": 4}, "max_new_tokens": {"max_new_tokens": 3}, "reducer": {"reducer": ReducerSettings()}}
    others["backbone.dtype"] = {"backbone": replace(many.backbone, dtype="bfloat16")}
    for name, other in others.items():
        with pytest.raises(UserError, match=f"begun with another {name} "):
            predict(replace(many, **other))
    plugin(tmp_path, many, 1)  # other weights in the same folder
    with pytest.raises(UserError, match="begun with another reducer "):
        predict(many)
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == before
    plugin(tmp_path, many, 0)
    predict(replace(many, batch_size=1))
    assert output.read_bytes().startswith(begun)
    assert output.read_bytes().count(b"\n") == 4
    (output.parent / "a.jsonl.settings.yaml").unlink()
    with pytest.raises(UserError, match="does not say what gave them"):
        predict(many)


def test_the_settings_beside_the_answers_can_be_given_back(many: PredictSettings, tiny_folder: Path) -> None:
    predict(many)
    saved = settings_file(str(many.output))
    assert saved.name == "a.jsonl.settings.yaml"
    assert saved != beside(Path(str(many.output)).with_suffix(".json")), "which belong to a report of evaluate"
    assert resolve(PredictSettings, [f"config={saved}"], configs_dir(), "predict") == many
    facts = json.loads(saved.read_text().partition("\n")[0].removeprefix("# answered with "))
    assert facts["backbone"] == load_backbone(tiny_folder, device="cpu").identity.hash
    assert len(facts["reducer"]) == 64


def test_an_output_is_held_before_anything_is_loaded_or_written(
    many: PredictSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_reduce.commands.predict.load_backbone", None)
    output = Path(str(many.output))
    with locked(output), pytest.raises(UserError, match="written by another run"):
        predict(replace(many, keep=4))
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("content", ['{"precious":1}', "notes\n", '{"image": "a.png", "prompt": "mine"}\n'])
def test_a_file_of_the_user_is_left_alone(many: PredictSettings, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr("lit_reduce.commands.predict.load_backbone", None)
    output = Path(str(many.output))
    output.write_text(content)
    with pytest.raises(UserError, match="line 1 does not answer row 1"):
        predict(many)
    assert output.read_text() == content
    assert [path.name for path in output.parent.iterdir()] == ["a.jsonl"]


def test_an_output_removed_while_running_is_an_error(
    many: PredictSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def removed(*_: Any) -> list[dict[str, Any]]:
        Path(str(many.output)).unlink()
        return [{"answer": "red"}] * 2

    monkeypatch.setattr("lit_reduce.commands.predict.answer_batch", removed)
    with pytest.raises(UserError, match="removed or replaced"):
        predict(many)
    assert capsys.readouterr().out == ""
