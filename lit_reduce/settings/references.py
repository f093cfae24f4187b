"""What ``auto`` stands for: the reference models that installed packages announce."""

import typing
from typing import Any, TypeVar

from omegaconf import OmegaConf

from lit_reduce.errors import UserError
from lit_reduce.registry import Reference, default_reference, references
from lit_reduce.settings.groups import AUTO

T = TypeVar("T")
NO_BACKBONE = "no reference model is installed: give backbone=FOLDER or a hub id"


def fill_backbone(settings: Any) -> None:
    """Puts the name of the default reference model where the backbone is ``auto``.

    Raises:
        UserError: None is installed.
    """
    if OmegaConf.select(settings, "backbone.name", default=None) == AUTO:
        settings.backbone.name = _default(NO_BACKBONE).name


def fill_rest(settings: Any) -> None:
    """Replaces ``auto`` where it depends on the backbone, which must be known: data, plug-ins and their folder.

    Raises:
        UserError: There is nothing that it could stand for.
    """
    for key in ("data.name", "data"):
        if OmegaConf.select(settings, key, default=None) == AUTO:
            name = _default(f"no reference questions are installed: give {key}=FILE.jsonl").name
            OmegaConf.update(settings, key, name)
    named = OmegaConf.select(settings, "backbone.name", default=None)
    reference = references().get(str(named))
    if OmegaConf.select(settings, "reducer.name", default=None) == AUTO:
        if reference is None or not reference.plugin:
            raise UserError(
                f"no reducer is given, and {named} comes with no plug-in: write reducer=PLUGIN, a name that "
                "lit-reduce list shows, or none"
            )
        settings.reducer.name = f"{reference.name}/{reference.plugin}"
    if OmegaConf.select(settings, "plugins", default=None) == AUTO:
        if reference is None or reference.plugins is None:
            raise UserError(f"{named} comes with no plug-ins: give plugins=FOLDER")
        settings.plugins = str(reference.plugins)


def with_references(settings: T) -> T:
    """A copy of a settings object in which the names of references stand for ``auto``.

    Raises:
        UserError: There is nothing that ``auto`` could stand for.
    """
    merged = OmegaConf.structured(settings)
    fill_backbone(merged)
    fill_rest(merged)
    return typing.cast("T", OmegaConf.to_object(merged))


def _default(otherwise: str) -> Reference:
    reference = default_reference()
    if reference is None:
        raise UserError(otherwise)
    return reference
