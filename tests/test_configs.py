"""The shipped settings: complete, commented, and accepted by the commands they belong to."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_reduce.benchmark.bench import BenchSettings
from lit_reduce.commands.compare import CompareSettings
from lit_reduce.commands.evaluate import EvaluateSettings
from lit_reduce.commands.predict import PredictSettings
from lit_reduce.commands.table import TableSettings
from lit_reduce.distill.settings import TrainSettings
from lit_reduce.reducer import available
from lit_reduce.settings import BackboneSettings, ReducerSettings, configs_dir, resolve

FILES = sorted(configs_dir().rglob("*.yaml"))
COMMANDS = {
    "predict": PredictSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "train": TrainSettings,
    "bench": BenchSettings,
    "table": TableSettings,
}
GROUPS = {"backbone": BackboneSettings, "reducer": ReducerSettings}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_value_has_a_comment_beside_or_above_it(path: Path) -> None:
    previous = ""
    for line in path.read_text().splitlines():
        if line.strip() and not line.lstrip().startswith(("#", "-")) and not line.rstrip().endswith(":"):
            assert " # " in line or previous.lstrip().startswith("#"), line
        previous = line
        assert len(line) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_resolve_and_show_every_setting(name: str) -> None:
    keys = set(OmegaConf.load(configs_dir() / f"{name}.yaml"))
    assert keys == {field.name for field in dataclasses.fields(COMMANDS[name])}
    assert isinstance(resolve(COMMANDS[name], [], configs_dir(), name), COMMANDS[name])


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "train"], ids=lambda path: path.stem)
def test_presets_change_the_training_of_a_trained_reducer(path: Path) -> None:
    assert available()[path.stem].trained
    preset, plain = OmegaConf.load(path), dataclasses.asdict(resolve(TrainSettings, [], configs_dir(), "train"))
    for word in (f"reducer={path.stem}", f"reducer.name={path.stem}"):
        chosen = dataclasses.asdict(resolve(TrainSettings, [word], configs_dir(), "train"))
        assert OmegaConf.merge(chosen, preset) == OmegaConf.create(chosen)
    assert not {"reducer", "backbone", "output", "seed"} & set(preset), "these are the user's"
    for key, value in preset.items():
        assert OmegaConf.merge({key: plain[key]}, {key: value}) != OmegaConf.create({key: plain[key]}), (
            f"{key} says nothing"
        )


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in GROUPS], ids=lambda path: path.stem)
def test_group_files_fit_their_group(path: Path) -> None:
    group = path.parent.name
    chosen = getattr(resolve(PredictSettings, [f"{group}={path.stem}"], configs_dir(), "predict"), group)
    assert dataclasses.asdict(chosen) == OmegaConf.to_container(OmegaConf.load(path)) | (
        {} if "revision" in OmegaConf.load(path) else {"revision": None}
    )
