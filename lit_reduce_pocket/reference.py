"""pocket and pocket-hd as references: what the entry points of this package announce."""

from functools import partial
from pathlib import Path
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.registry import Reference

PACKAGE = Path(__file__).resolve().parent


def _root(name: str) -> Path:
    """The weights beside the package when installed, under checkpoints/ of a checkout otherwise."""
    inside = PACKAGE / "checkpoints" / name
    return inside if inside.is_dir() else PACKAGE.parent / "checkpoints" / name


def _folder(name: str) -> Path:
    folder = _root(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"'{name}' is not installed: run from a checkout, which holds it in checkpoints/{name}")
    return folder


def _rows(make: str, split: str, count: int) -> Any:
    if make == "pocket":
        from lit_reduce_pocket.data import scene_rows as rows
    else:
        from lit_reduce_pocket.hd_world import hd_rows as rows
    return rows(split, count)


def _groups(make: str, split: str, count: int, turns: int) -> Any:
    if make == "pocket":
        from lit_reduce_pocket.data import scene_groups as groups
    else:
        from lit_reduce_pocket.hd_world import hd_groups as groups
    return groups(split, count, turns)


def _reference(name: str, plugin: str, *, default: bool) -> Reference:
    questions = {name: partial(_rows, name, "test"), f"{name}-val": partial(_rows, name, "val")}
    return Reference(name, partial(_folder, name), questions, partial(_groups, name), _root(name), plugin, default)


POCKET = _reference("pocket", "covipal", default=True)
POCKET_HD = _reference("pocket-hd", "falcon", default=False)
