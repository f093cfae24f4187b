"""Plans: what a name stands for, and that a plan does what the model alone would do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.errors import UserError
from lit_reduce.inference.spec import ReducerSpec, find_spec, generate, visual_counts
from lit_reduce.plugin import PluginConfig, save_plugin
from lit_reduce.reducer import create
from lit_reduce.runtime import attach
from lit_reduce.settings import ReducerSettings


def save(folder: Path, backbone: Backbone, positions: str = "keep") -> Path:
    reducer = create("random", seed=3)
    config = PluginConfig(
        format_version=1, reducer="random", options={}, backbone=backbone.identity, budgets=[4], positions=positions,
        library_version="0.1.0", metrics={},
    )  # fmt: skip
    return save_plugin(folder, reducer, config)


def test_names_folders_and_none(tiny: Backbone, tmp_path: Path) -> None:
    assert find_spec(ReducerSettings("none"), 64) == ReducerSpec()
    baseline = find_spec(ReducerSettings("random", {"seed": 7}), "0.25")
    assert baseline.reducer is not None
    assert (baseline.reducer.config.seed, baseline.keep, baseline.positions) == (7, 0.25, "keep")
    plugin = find_spec(ReducerSettings(str(save(tmp_path / "plug", tiny, "renumber"))), 8)
    assert plugin.reducer is not None
    assert (plugin.reducer.config.seed, plugin.keep, plugin.positions) == (3, 8, "renumber")
    plugin.check(tiny)


def test_what_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'random'"):
        find_spec(ReducerSettings("randon"), 8)
    with pytest.raises(UserError, match="no plug-in at"):
        find_spec(ReducerSettings(str(tmp_path / "none")), 8)
    with pytest.raises(UserError, match="at least 1"):
        find_spec(ReducerSettings("none"), 0)
    with pytest.raises(UserError, match="carries its own"):
        find_spec(ReducerSettings(str(save(tmp_path / "plug", tiny)), {"seed": 1}), 8)
    with pytest.raises(UserError, match="only 36 visual tokens"):
        find_spec(ReducerSettings("grid"), 37).check(tiny)
    find_spec(ReducerSettings("grid"), 37).check(replace(tiny, identity=replace(tiny.identity, tokens=0)))  # varies
    foreign = find_spec(ReducerSettings(str(tmp_path / "plug")), 8)
    assert foreign.trained_for is not None
    foreign.trained_for.backbone.hash = "0" * 64
    with pytest.raises(UserError, match="other weights"):
        foreign.check(tiny)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_generate_answers_as_the_attached_model_does(
    tiny: Backbone, pictures: list[Image.Image], positions: str
) -> None:
    inputs = tiny.prepare(pictures[:2], ["what is red ?", "the big ?"])
    plan = ReducerSpec(create("fastervlm"), 9, positions)
    answers, logical = generate(tiny, inputs, plan, 4)
    assert logical is not None
    assert (logical.total, logical.kept) == ([36, 36], [9, 9])
    assert visual_counts(tiny, inputs) == [36, 36]
    with attach(tiny.model, plan.reducer, keep=9, positions=positions):
        sequences = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answers == tiny.decode(sequences, inputs)
    assert answers != generate(tiny, inputs, ReducerSpec(), 4)[0]


def test_no_plan_is_the_plain_model(tiny: Backbone, pictures: list[Image.Image]) -> None:
    inputs = tiny.prepare(pictures[:1], ["what is red ?"])
    answers, logical = generate(tiny, inputs, ReducerSpec(), 4)
    assert logical is None
    with torch.no_grad():
        assert answers == tiny.decode(tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False), inputs)


def test_tokens_of_videos_count() -> None:
    video = build("llava_onevision_video")
    backbone = Backbone(video.model, None, None, None)  # type: ignore[arg-type]
    expected = (video.inputs["input_ids"] == video.token).sum(1).tolist()
    assert visual_counts(backbone, video.inputs) == expected
    assert min(expected) > 0
