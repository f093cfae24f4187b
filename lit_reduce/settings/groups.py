"""The groups of settings that all commands share: which backbone, which reducer, which preset."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option

AUTO = "auto"
NONE = "none"


@dataclass
class BackboneSettings:
    """Which frozen model: the group ``backbone``."""

    name: str = option(
        AUTO, "a reference model, a folder, a hub id, or shape:NAME (random weights); auto: the default reference model"
    )
    dtype: str | None = option(
        None,
        "numbers of the weights; null: float32 on the CPU, the checkpoint's own on a GPU",
        choices=("float32", "bfloat16", "float16", "auto"),
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; null takes the GPU where there is one")
    revision: str | None = option(None, "branch, tag or commit of a hub id")


@dataclass
class ReducerSettings:
    """Which reducer: the group ``reducer``."""

    name: str = option(
        NONE, "a name that lit-reduce list shows, the folder or hub id of a plug-in, or none for all tokens"
    )
    options: dict[str, Any] = option({}, "settings of a reducer that is made by name; a plug-in carries its own")
    revision: str | None = option(None, "branch, tag or commit of a hub id")


def backbone(name: str = AUTO) -> Any:
    """The field ``backbone`` of a command."""
    return option(BackboneSettings(name), "which frozen model; backbone=NAME sets backbone.name")


def reducer(name: str, use: str) -> Any:
    """The field ``reducer`` of a command.

    Args:
        name: The default reducer.
        use: What the command does with it.
    """
    return option(ReducerSettings(name), f"{use}; reducer=NAME sets reducer.name")


def preset() -> Any:
    """The field ``preset`` of a command."""
    return option(
        AUTO,
        "values that suit one backbone: a folder of configs/preset/, or none; auto: the folder named like the "
        "backbone, if there is one",
    )
