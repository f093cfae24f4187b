"""A teacher on the tiny backbone with two pictures of three questions, and a covipal that fits it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.teacher import Teacher
from lit_reduce.reducer import Reducer, create
from lit_reduce.settings.train import DataSettings, LossSettings, TrainSettings

TURNS = [("what is the red w30 here ?", "w40 w41"), ("is big ?", "w50"), ("what ?", "w60 w61 w62")]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone never ends an answer by itself."""
    monkeypatch.setattr("lit_reduce.distill.teacher.LONGEST", 32)


@pytest.fixture
def groups(pictures: list[Image.Image]) -> list[Group]:
    """Three pictures with three questions each."""
    return [Group(f"g{i}", picture.copy, tuple(TURNS[i:] + TURNS[:i])) for i, picture in enumerate(pictures)]


@pytest.fixture
def teacher(tiny: Backbone) -> Teacher:
    return Teacher(tiny, [2, 3])


@pytest.fixture
def batch(teacher: Teacher, groups: list[Group]) -> Batch:
    """Five questions of unequal length about two pictures."""
    return make_batch([(teacher.outputs(groups[0]), [0, 1, 2]), (teacher.outputs(groups[1]), [2, 0])])


def make_reducer() -> Reducer:
    torch.manual_seed(1)
    return create("covipal", hidden_size=32, width=16, heads=2, layers=1)


@pytest.fixture
def covipal() -> Reducer:
    return make_reducer()


def make_settings(folder: Path, **changes: Any) -> TrainSettings:
    """Ten steps, the last six of stage 2."""
    base: dict[str, Any] = {
        "output": str(folder), "data": DataSettings(cache=None), "loss": LossSettings(), "budgets": [4, 12],
        "val_budgets": [6], "steps": 10, "guide_steps": 4, "pictures": 2, "turns": 2, "warmup": 2, "val_every": 5,
        "save_every": 3, "accelerator": "cpu", "learning_rate": 1e-2, "precision": "32-true",
    }  # fmt: skip
    return TrainSettings(**{**base, **changes})


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    return make_settings(tmp_path / "out")


def make_data(teacher: Teacher, groups: list[Group], chosen: TrainSettings) -> DistillData:
    return DistillData(
        teacher, groups[:2], groups[2:], pictures=chosen.pictures, turns=chosen.turns, steps=chosen.steps,
        seed=chosen.seed,
    )  # fmt: skip


@pytest.fixture
def make() -> Any:
    """Functions that tests share."""

    class Make:
        reducer = staticmethod(make_reducer)
        settings = staticmethod(make_settings)
        data = staticmethod(make_data)

    return Make
