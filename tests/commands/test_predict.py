"""One question costs one ``generate``; times are measured only when they are asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from noise import noise
from transformers import LlavaForConditionalGeneration

from lit_reduce.commands.predict import predict
from lit_reduce.errors import UserError
from lit_reduce.settings import BackboneSettings, ReducerSettings
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
