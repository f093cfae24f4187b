"""The shipped settings: complete, explained, and what they were before they moved."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lit_reduce.benchmark.phase_timer import CLOCKS
from lit_reduce.distill.logs import LOGGERS
from lit_reduce.distill.relaxation import GATES
from lit_reduce.plugin import load_plugin, read_config
from lit_reduce.reducer import available
from lit_reduce.settings import ReducerSettings, configs_dir, reference, resolve
from lit_reduce.settings.bench import BenchSettings
from lit_reduce.settings.evaluate import CLOCKS as CLOCK_NAMES
from lit_reduce.settings.predict import PredictSettings
from lit_reduce.settings.render import leaves, user_fields
from lit_reduce.settings.table import TableSettings
from lit_reduce.settings.train import GATES as GATE_NAMES
from lit_reduce.settings.train import LOGGERS as LOGGER_NAMES
from lit_reduce.settings.train import TrainSettings
from lit_reduce_pocket.hd import HdSettings
from lit_reduce_pocket.quality import QualitySettings
from lit_reduce_pocket.recipe import RecipeSettings

ROOT = Path(__file__).parents[1]
PRESETS = sorted((configs_dir() / "preset").rglob("*.yaml"))
FROZEN = json.loads((Path(__file__).parent / "frozen" / "train_settings.json").read_text())
SCHEMAS = [*reference.COMMANDS.values(), RecipeSettings, HdSettings, QualitySettings]
NOW = {"yardsticks": "baselines", "start": "init_from", "only": "trainable"}
NOW_OPTIONS = {"rest": "summary"}


def train(*words: str) -> dict[str, Any]:
    return dataclasses.asdict(resolve(TrainSettings, words, configs_dir(), "train"))


def test_files_and_pages_are_those_that_the_dataclasses_make() -> None:
    texts = reference.pages()
    for name, text in texts.items():
        assert (ROOT / name).read_text() == text, f"{name} is stale: run lit-reduce settings --write"
    there = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/reducer/*.yaml")]}
    assert there == {name for name in texts if name.startswith("configs/")}


@pytest.mark.parametrize("name", reference.COMMANDS)
def test_the_file_of_a_command_holds_its_defaults(name: str, tmp_path: Path) -> None:
    schema, file = reference.COMMANDS[name], ROOT / "configs" / f"{name}.yaml"
    assert OmegaConf.to_container(OmegaConf.load(file)) == dataclasses.asdict(schema())
    words = ["preset=none"] if "preset" in schema.__dataclass_fields__ else []
    plain = resolve(schema, words, configs_dir(), name)
    assert resolve(schema, [*words, f"config={file}"], configs_dir(), name) == plain


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_setting_is_explained_and_its_default_is_allowed(schema: type) -> None:
    for key, _, metadata in leaves(schema()):
        assert len(metadata["help"]) > 3, key
    if schema is not TableSettings:
        resolve(schema, ["reducer=none"] if schema is PredictSettings else [], configs_dir(), "x")


@pytest.mark.parametrize("name", available())
def test_every_option_of_a_reducer_is_explained_and_its_file_makes_the_same_network(name: str) -> None:
    schema = available()[name].config_class
    for entry in dataclasses.fields(schema):
        assert len(entry.metadata["help"]) > 3, entry.name
    file = ROOT / "configs" / "reducer" / f"{name}.yaml"
    assert file.is_file() == bool(user_fields(schema))
    if file.is_file():
        content = OmegaConf.to_container(OmegaConf.load(file))
        assert content["name"] == name
        assert schema.from_options(content["options"]) == schema()


def test_choices_are_what_the_code_knows() -> None:
    assert (set(GATES), set(LOGGERS), set(CLOCKS)) == (set(GATE_NAMES), set(LOGGER_NAMES), set(CLOCK_NAMES))


@pytest.mark.parametrize("name", FROZEN)
def test_training_for_pocket_is_what_it_was(name: str) -> None:
    """The settings that 0.1.0 resolved ``train reducer=NAME`` to, with all options of the network."""
    before = {NOW.get(key, key): value for key, value in FROZEN[name].items()} | {"preset": "pocket"}
    options = {NOW_OPTIONS.get(key, key): value for key, value in before["reducer"]["options"].items()}
    before["reducer"] |= {"options": options}
    for word in (f"reducer={name}", f"reducer.name={name}"):
        now = train(word)
        schema = available()[name].config_class
        now["reducer"]["options"] = dataclasses.asdict(schema.from_options(now["reducer"]["options"]))
        assert now == before


def test_every_trained_reducer_is_frozen() -> None:
    assert set(FROZEN) == {name for name, cls in available().items() if cls.trained}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_presets_change_the_training_of_a_trained_reducer(path: Path) -> None:
    """Each value of a preset is taken, differs from the default, and is none of those that are the user's."""
    preset: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert not {"backbone", "output", "seed", "preset"} & set(preset)
    words = [f"backbone={path.parent.name}", f"reducer={'covipal' if path.stem == 'train' else path.stem}"]
    chosen, plain = train(*words), train(*words, "preset=none")
    name = chosen["reducer"]["name"]
    plain["reducer"]["options"] = dataclasses.asdict(available()[name].config_class())
    assert available()[name].trained
    for key, value in preset.items():
        assert OmegaConf.merge({key: chosen[key]}, {key: value}) == OmegaConf.create({key: chosen[key]})
        assert OmegaConf.merge({key: plain[key]}, {key: value}) != OmegaConf.create({key: plain[key]}), (
            f"{key} says nothing"
        )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_value_of_a_preset_has_a_comment(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert line.startswith("#") or line.rstrip().endswith(":") or " # " in line, line
        assert len(line) <= 120


@pytest.mark.parametrize("name", [name for name, cls in available().items() if cls.trained])
def test_a_bench_measures_the_network_that_training_makes(name: str) -> None:
    found = resolve(BenchSettings, ["backbone=pocket", f"reducer={name}"], configs_dir(), "bench")
    assert found.preset == "pocket"
    assert found.reducer == ReducerSettings(**train(f"reducer={name}")["reducer"])


def test_a_backbone_of_configs(tmp_path: Path) -> None:
    for path in (configs_dir() / "backbone").glob("*.yaml"):
        words = [f"backbone={path.stem}", "reducer=none"]
        chosen = resolve(PredictSettings, words, configs_dir(), "predict").backbone
        assert dataclasses.asdict(chosen) == {"dtype": None, "device": None, "revision": None} | OmegaConf.load(path)


def test_what_a_user_writes_stays_out_of_the_documentation() -> None:
    for schema in reference.COMMANDS.values():
        for key, value, _ in leaves(schema()):
            assert not str(value).startswith(("docs", "checkpoints")), key


@pytest.mark.parametrize("path", sorted(ROOT.glob("checkpoints/*/*/reducer_config.json")), ids=lambda p: p.parent.name)
def test_shipped_plug_ins_say_every_option(path: Path) -> None:
    """So that no default of today decides what they are."""
    config = read_config(path.parent)
    fields = {entry.name for entry in dataclasses.fields(available()[config.reducer].config_class)}
    assert {NOW_OPTIONS.get(key, key) for key in config.options} == fields


def test_a_plug_in_with_former_option_names_loads(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """covipal's ``summary`` was ``rest`` in plug-ins of 0.1.0: tests/frozen/plugin_0_1_0 is one, as it was written."""
    old = Path(__file__).parent / "frozen" / "plugin_0_1_0"
    assert "rest" in json.loads((old / "reducer_config.json").read_text())["options"]
    reducer, config = load_plugin(old)
    assert reducer.config.summary == 2
    assert reducer.kind == "resample"
    assert config.reducer == "covipal"
    assert not [warning for warning in recwarn if "unknown entries" in str(warning.message)]
