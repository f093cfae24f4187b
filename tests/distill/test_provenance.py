"""A checkpoint is continued by its own run alone, holds what it was written with, and survives a full disk."""

import errno
import os
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.checkpoint import CheckedIO, read_checkpoint
from lit_reduce.distill.export import notes, plugin_config
from lit_reduce.distill.provenance import KEY, run_facts
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.train import train
from lit_reduce.distill.trainer import check_checkpoint, fit
from lit_reduce.errors import UserError
from lit_reduce.files import locked
from lit_reduce.plugin import save_plugin
from lit_reduce.settings import BackboneSettings
from lit_reduce.settings.train import DataSettings, LossSettings, TrainSettings

Change = Callable[[TrainSettings, Backbone, list[Group]], tuple[TrainSettings, Backbone, list[Group]]]

DECIDES: dict[str, tuple[str, Change]] = {
    "seed": ("seed (0, now 3)", lambda s, b, g: (replace(s, seed=3), b, g)),
    "budgets": ("budgets", lambda s, b, g: (replace(s, budgets=[4, 9]), b, g)),
    "loss": ("loss.kl", lambda s, b, g: (replace(s, loss=LossSettings(kl=0.5)), b, g)),
    "steps": ("steps (10, now 20)", lambda s, b, g: (replace(s, steps=20), b, g)),
    "weights that train": ("trainable", lambda s, b, g: (replace(s, trainable=["kinds"]), b, g)),
    "two of them": ("seed (0, now 1), steps (10, now 4)", lambda s, b, g: (replace(s, seed=1, steps=4), b, g)),
    "other questions": ("data", lambda s, b, g: (s, b, g[::-1])),
    "another backbone of the same shape": ("backbone", lambda s, b, g: (s, changed(b), g)),
}


def changed(backbone: Backbone) -> Backbone:
    """A copy of the backbone with a weight that differs."""
    model = deepcopy(backbone.model)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    return replace(backbone, model=model)


@pytest.fixture
def begun(tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings) -> Path:
    """The checkpoint of a run that has just begun, without the time that training takes."""
    reducer = make.reducer()
    state = {f"reducer.{name}": x for name, x in reducer.state_dict().items()}
    facts = run_facts(settings, tiny.model, reducer, make.data(teacher, groups, settings))
    path = Path(settings.output) / "last.ckpt"
    CheckedIO().save_checkpoint({"state_dict": state, "global_step": 3, KEY: facts}, path)
    return path


def test_the_same_run_goes_on(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings, begun: Path
) -> None:
    free = replace(settings, output="elsewhere", save_every=1, table_budgets=[], val_budgets=[4], logger="wandb")
    facts = run_facts(free, tiny.model, make.reducer(), make.data(teacher, groups, free))
    assert check_checkpoint(begun, make.reducer(), facts) == 3


@pytest.mark.parametrize("case", DECIDES)
def test_another_run_is_refused_and_named(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings, begun: Path, case: str
) -> None:
    named, change = DECIDES[case]
    other, backbone, asked = change(settings, tiny, groups)
    before = begun.read_bytes()
    with pytest.raises(UserError) as error:
        fit(other, backbone.model, make.reducer(), make.data(teacher, asked, other), begun.parent)
    assert f"another setting of {named}" in str(error.value)
    assert "\n" not in str(error.value)
    assert begun.read_bytes() == before


def test_options_and_the_weights_that_training_starts_from_count(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings, tmp_path: Path
) -> None:
    reducer, data = make.reducer(), make.data(teacher, groups, settings)
    chosen = replace(settings, init_from=str(tmp_path / "plug"))
    save_plugin(tmp_path / "plug", reducer, plugin_config(settings, tiny, reducer))
    first = run_facts(chosen, tiny.model, reducer, data)
    assert first == run_facts(chosen, tiny.model, reducer, data)
    with torch.no_grad():
        next(reducer.parameters()).add_(1e-3)
    save_plugin(tmp_path / "plug", reducer, plugin_config(settings, tiny, reducer))
    second = run_facts(chosen, tiny.model, reducer, data)
    assert [name for name in first if first[name] != second[name]] == ["init_from"]
    assert "reducer.options.width" in first


def test_a_checkpoint_that_says_nothing_is_refused(begun: Path, make: Any) -> None:
    content, _ = read_checkpoint(begun)
    facts = content.pop(KEY)
    CheckedIO().save_checkpoint(content, begun)
    with pytest.raises(UserError, match="does not say what it was trained with"):
        check_checkpoint(begun, make.reducer(), facts)


def test_any_flipped_bit_of_a_checkpoint_is_noticed(begun: Path, make: Any) -> None:
    whole, chance = begun.read_bytes(), random.Random(0)
    assert set(torch.load(begun, weights_only=True)) == {"state_dict", "global_step", KEY}  # torch reads it, too
    facts = read_checkpoint(begun)[0][KEY]
    places = [*(chance.randrange(len(whole)) for _ in range(60)), *range(len(whole) - 75, len(whole), 3)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        begun.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged|does not say"):
            check_checkpoint(begun, make.reducer(), facts)


def test_a_full_disk_leaves_the_last_good_checkpoint(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = begun.read_bytes()

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"last\.ckpt: No space left on device"):
        CheckedIO().save_checkpoint({"state_dict": {}}, begun)
    assert begun.read_bytes() == whole
    assert [path.name for path in begun.parent.iterdir()] == ["last.ckpt"]


def test_checkpoints_are_written_beside_their_place(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", None)  # writes elsewhere and moves the file
    chosen = replace(settings, steps=2, guide_steps=0, save_every=1, val_every=2)
    fit(chosen, tiny.model, make.reducer(), make.data(teacher, groups, chosen), Path(chosen.output))
    content, checked = read_checkpoint(Path(chosen.output) / "last.ckpt")
    assert checked
    assert (content["global_step"], content[KEY]["seed"]) == (2, "0")


def test_a_run_that_diverges_stops_before_it_writes(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, settings: TrainSettings
) -> None:
    chosen = replace(settings, steps=2, guide_steps=0, save_every=1, val_every=2)
    reducer = make.reducer()
    with torch.no_grad():
        next(reducer.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"diverged at step 1: .* not finite"):
        fit(chosen, tiny.model, reducer, make.data(teacher, groups, chosen), Path(chosen.output))
    assert not (Path(chosen.output) / "last.ckpt").exists()


def test_any_flipped_bit_of_the_cache_is_made_again(tiny: Backbone, groups: list[Group], tmp_path: Path) -> None:
    cached = Teacher(tiny, [2], cache=tmp_path)
    first = cached.outputs(groups[0])
    (path,) = tmp_path.rglob("*.safetensors")
    whole, chance = path.read_bytes(), random.Random(1)
    for _ in range(12):
        data = bytearray(whole)
        data[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        again = cached.outputs(groups[0])
        assert set(again) == set(first)
        assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_number_formats_do_not_share_a_cache(tiny: Backbone, tmp_path: Path) -> None:
    before = Teacher(tiny, [2], cache=tmp_path).cache
    tiny.model.bfloat16()
    assert Teacher(tiny, [2], cache=tmp_path).cache != before


def test_an_output_that_another_run_writes_is_refused(
    settings: TrainSettings, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr("lit_reduce.distill.train.load_backbone", lambda *given: loaded.append(given) or 1 / 0)
    chosen = replace(settings, backbone=BackboneSettings(str(tiny_folder)))
    Path(chosen.output).mkdir()
    with locked(Path(chosen.output) / ".lock"), pytest.raises(UserError, match="written by another run"):
        train(chosen)
    assert not loaded
    with pytest.raises(ZeroDivisionError):
        train(chosen)
    assert list(Path(chosen.output).iterdir()) == []


def test_the_card_counts_the_pictures_of_a_file(settings: TrainSettings) -> None:
    own = replace(settings, data=DataSettings("rows.jsonl"))
    assert "(6 pictures, 10 steps" in notes(own, pictures=6)
    assert "(10 steps" in notes(own)
    assert "(700 pictures, 10 steps" in notes(replace(settings, data=DataSettings("pocket")))
