"""Presets: values that suit one backbone, below ``configs/preset/NAME/``.

``train.yaml`` holds what all trainings for it have in common, and ``REDUCER.yaml`` what one reducer changes: settings
of ``train``, and options of the reducer under ``reducer``. Other commands take only these options.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.settings.groups import AUTO, NONE
from lit_reduce.settings.words import read_yaml

TRAIN = "train"


@dataclass(frozen=True)
class Preset:
    """The values of a preset that one command takes for one reducer."""

    name: str = NONE
    files: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    reducer: str = NONE
    options: dict[str, Any] = field(default_factory=dict)

    def options_of(self, reducer: str) -> dict[str, Any]:
        """The options that a reducer starts from when it is named."""
        return dict(self.options) if reducer == self.reducer else {}


def find_preset(configs: Path, chosen: str, backbone: str, command: str, reducer: str) -> Preset:
    """The preset that the user chose or, for ``auto``, that of the backbone, if it has one.

    Raises:
        UserError: The chosen one does not exist, or one of its files cannot be read.
    """
    known = preset_names(configs)
    name = (backbone if backbone in known else NONE) if chosen == AUTO else chosen
    if name == NONE:
        return Preset()
    if name not in known:
        raise UserError(f"preset={name} is not known: use {', '.join([*known, NONE])}")
    folder = configs / "preset" / name
    files: list[tuple[Path, dict[str, Any]]] = []
    options: dict[str, Any] = {}
    if (common := folder / f"{command}.yaml").is_file():
        files.append((common, read_yaml(common)))
    own = folder / f"{reducer}.yaml"
    if reducer != command and Path(reducer).name == reducer and own.is_file():
        content = read_yaml(own)
        group = content.pop("reducer", {})
        if not isinstance(group, dict) or set(group) - {"options"}:
            raise UserError(f"settings file {own}: reducer may hold options alone")
        options = group.get("options", {})
        if command == TRAIN:
            files.append((own, content))
    return Preset(name, files, reducer, options)


def preset_names(configs: Path) -> list[str]:
    """The presets that there are."""
    return sorted(path.name for path in (configs / "preset").glob("*") if path.is_dir())
