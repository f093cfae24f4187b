"""Filling a settings dataclass: its defaults <- preset <- ``config=FILE`` <- ``key=value`` words.

A setting whose type is a dataclass is a *group*: ``backbone=llava`` fills it from ``configs/backbone/llava.yaml`` when
that file exists; any other word becomes the group's ``name``, as in ``reducer=outputs/train/plugin``.
"""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_reduce.errors import UserError
from lit_reduce.options import check
from lit_reduce.reducer import available
from lit_reduce.settings.groups import ReducerSettings
from lit_reduce.settings.presets import Preset, find_preset
from lit_reduce.settings.references import fill_backbone, fill_rest
from lit_reduce.settings.render import help_text, to_yaml
from lit_reduce.settings.schema import check_keys, is_group, types_of
from lit_reduce.settings.words import nested, one_line, parse, read_yaml, split

T = TypeVar("T")


def configs_dir() -> Path:
    """The folder of presets and group files: in the package when installed, at the root of a checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def resolve(schema: type[T], argv: Sequence[str], configs: Path, name: str) -> T:
    """Merge the defaults of ``schema``, the preset, any ``config=FILE`` and the words of ``argv``; checks all values.

    ``--help`` prints the commented defaults and ``--validate`` the resolved settings; both then exit with code 0.

    Args:
        schema: The dataclass that says which settings exist.
        argv: Words from the command line: ``key=value``, ``--help``, ``--validate``.
        configs: The folder with presets and one sub-folder per group.
        name: The command, for its presets.

    Raises:
        UserError: An unknown key (names the nearest right one), a value that is not allowed, a missing one, a bad file.
        SystemExit: After ``--help`` or ``--validate``.
    """
    flags = [word for word in argv if word.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(help_text(configs, schema), end="")
        raise SystemExit(0)
    for flag in flags:
        if flag != "--validate":
            raise UserError(f"unknown option {flag}: settings are written key=value, options are --help and --validate")
    words = [split(word) for word in argv if not word.startswith("-")]
    merged = _sources(schema, words, configs, Preset())
    fill_backbone(merged)
    if "preset" in types_of(schema):
        merged = _with_preset(schema, words, configs, name, merged)
    missing = [str(key) for key in OmegaConf.missing_keys(merged)]
    if missing:
        raise UserError(f"setting {missing[0]} is missing: give it as {missing[0]}=VALUE (--help lists the settings)")
    fill_rest(merged)
    try:
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"settings do not resolve: {one_line(error)}") from error
    check(settings)
    _check_options(getattr(settings, "reducer", None))
    if "--validate" in flags:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return typing.cast("T", settings)


def _with_preset(schema: type, words: Sequence[tuple[str, str]], configs: Path, command: str, first: Any) -> Any:
    """The sources again, with the preset that the first merge of them chose."""
    preset = find_preset(configs, first.preset, first.backbone.name, command, first.reducer.name)
    merged = _sources(schema, words, configs, preset)
    merged.preset = preset.name
    fill_backbone(merged)
    return merged


def _sources(schema: type, words: Sequence[tuple[str, str]], configs: Path, preset: Preset) -> Any:
    """The schema's own values, those of the preset, the files that the words name, then the other words."""
    merged = OmegaConf.structured(schema)
    if preset.options and merged.reducer.name == preset.reducer:
        merged.reducer.options = preset.options
    files = [*preset.files, *((path, read_yaml(path)) for path in (Path(v) for key, v in words if key == "config"))]
    for path, values in files:
        merged = _merge(merged, schema, values, configs, str(path), preset)
    # Group files and names first, so that `reducer.options.depth=3 reducer=covipal` means the same in either order.
    chosen = [(key, value) for key, value in words if key != "config"]
    for key, value in sorted(chosen, key=lambda word: (not is_group(schema, word[0]), not word[0].endswith(".name"))):
        values = nested(key, parse(schema, key, value))
        merged = _merge(merged, schema, values, configs, f"{key}={value}", preset)
    return merged


def _merge(target: Any, schema: type, values: Mapping[str, Any], configs: Path, origin: str, preset: Preset) -> Any:
    """Merge ``values`` over ``target``, expanding groups; ``origin`` says where an error came from."""
    check_keys(schema, values, origin)
    fresh: Any = OmegaConf.structured(schema)
    for key, value in values.items():
        if is_group(schema, key) and isinstance(value, str) and value != MISSING:
            value = _group(schema, key, value, configs)
            target[key] = fresh[key]  # a newly chosen group forgets the one chosen before
            if "options" in target[key] and "name" in value:
                target[key].options = preset.options_of(value["name"])
        elif is_group(schema, key) and _renamed(target[key], value):
            target[key].options = preset.options_of(value["name"])  # the old ones are of what had been chosen
        try:
            target = OmegaConf.merge(target, {key: value})
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"bad value in {origin}: {one_line(error)}") from error
    return target


def _renamed(group: Any, value: Any) -> bool:
    """Whether ``value`` chooses another name in a group that has options of its name."""
    return isinstance(value, Mapping) and "options" in group and value.get("name", group.name) != group.name


def _group(schema: type, key: str, value: str, configs: Path) -> dict[str, Any]:
    """The contents of group ``key`` that the word ``value`` stands for."""
    kind = types_of(schema)[key]
    file = configs / key / f"{value}.yaml"
    # The file of a reducer in the register only shows its defaults.
    own = kind is ReducerSettings and value in available()
    if Path(value).name == value and file.is_file() and not own:
        content = read_yaml(file)
        check_keys(kind, content, str(file))
        return content
    if "name" in types_of(kind):
        return {"name": value}
    known = ", ".join(sorted(path.stem for path in (configs / key).glob("*.yaml"))) or "none"
    raise UserError(f"no settings file {file} for {key}={value}: there are {known}")


def _check_options(group: Any) -> None:
    """Refuses options that the named reducer does not have, before anything is loaded."""
    if isinstance(group, ReducerSettings) and group.options and group.name in available():
        available()[group.name].config_class.check_options(group.options, owner=group.name)
