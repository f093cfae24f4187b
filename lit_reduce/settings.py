"""Typed settings: dataclass defaults <- YAML files <- ``key=value`` words, with errors that name the right key.

A setting whose type is a dataclass is a *group*. ``reducer=covipal`` fills it from ``configs/reducer/covipal.yaml``
when that file exists; any other word becomes the group's ``name``, as in ``reducer=checkpoints/pocket/covipal``.

A command may have *presets*: numbers that go with the chosen reducer. ``reducer=packer`` and ``reducer.name=packer``
read ``configs/train/packer.yaml`` right after ``configs/train.yaml``; files and words of the user win over it.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic

T = TypeVar("T")


@dataclass
class BackboneSettings:
    """Which frozen model: the group ``backbone`` of every command.

    Attributes:
        name: ``pocket``, a folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``; None lets the device decide.
        device: ``cpu``, ``cuda``, ...; None takes the GPU where there is one.
        revision: Branch, tag or commit of a hub id.
    """

    name: str = "pocket"
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None


@dataclass
class ReducerSettings:
    """Which reducer: the group ``reducer`` of every command.

    Attributes:
        name: A name that ``lit-reduce list`` shows, the folder or hub id of a plug-in, or ``none``.
        options: Settings of a reducer that is made by name; a plug-in carries its own.
        revision: Branch, tag or commit of a hub id.
    """

    name: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None


def configs_dir() -> Path:
    """The folder of default settings: beside the package when installed, at the root of a checkout otherwise."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def resolve(schema: type[T], argv: Sequence[str], configs: Path, name: str) -> T:
    """Merge defaults of ``schema``, ``configs/<name>.yaml``, the preset, any ``config=FILE`` and the words of ``argv``.

    The preset is ``configs/<name>/<reducer.name>.yaml``, when there is one for the reducer that all of these choose.

    ``--help`` prints the commented defaults and ``--validate`` the resolved settings; both then exit with code 0.

    Args:
        schema: The dataclass that says which settings exist.
        argv: Words from the command line: ``key=value``, ``--help``, ``--validate``.
        configs: The folder with ``<name>.yaml`` and one sub-folder per group.
        name: Which defaults file to use: ``train``, ``predict`` or ``evaluate``.

    Raises:
        UserError: An unknown key (names the nearest right one), a value of a wrong type, a missing one, a bad file.
        SystemExit: After ``--help`` or ``--validate``.
    """
    flags = [word for word in argv if word.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(help_text(configs, name, schema), end="")
        raise SystemExit(0)
    for flag in flags:
        if flag != "--validate":
            raise UserError(f"unknown option {flag}: settings are written key=value, options are --help and --validate")
    words = [_split(word) for word in argv if not word.startswith("-")]
    merged = _sources(schema, words, configs, [configs / f"{name}.yaml"])
    if (preset := _preset(merged, configs / name)) is not None:
        merged = _sources(schema, words, configs, [configs / f"{name}.yaml", preset])
    missing = [str(key) for key in OmegaConf.missing_keys(merged)]
    if missing:
        raise UserError(f"setting {missing[0]} is missing: give it as {missing[0]}=VALUE (--help lists the settings)")
    try:
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"settings do not resolve: {_one_line(error)}") from error
    if "--validate" in flags:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return typing.cast("T", settings)


def _sources(schema: type, words: Sequence[tuple[str, str]], configs: Path, defaults: Sequence[Path]) -> Any:
    """The schema's own values, the files of defaults, those that the words name, then the other words."""
    merged = OmegaConf.structured(schema)
    for path in [*defaults, *(Path(value) for key, value in words if key == "config")]:
        merged = _merge(merged, schema, _read_yaml(path), configs, str(path))
    # Group files and names first, so that `reducer.options.depth=3 reducer=covipal` means the same in either order.
    chosen = [(key, value) for key, value in words if key != "config"]
    for key, value in sorted(chosen, key=lambda word: (not _is_group(schema, word[0]), not word[0].endswith(".name"))):
        merged = _merge(merged, schema, _nested(key, _parse(schema, key, value)), configs, f"{key}={value}")
    return merged


def _preset(merged: Any, folder: Path) -> Path | None:
    """The file of ``folder`` for the reducer that was chosen, if there is one; folders and hub ids have none."""
    name = OmegaConf.select(merged, "reducer.name", default=None)
    return folder / f"{name}.yaml" if name in _group_files(folder) else None


def to_yaml(settings: object) -> str:
    """Resolved settings as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(typing.cast("Any", settings)))))


def save(settings: object, path: str | Path) -> None:
    """Write resolved settings as YAML; the file can be given back with ``config=FILE``."""
    write_atomic(path, to_yaml(settings))


def beside(output: str | Path) -> Path:
    """Where the settings that made ``output`` are saved: ``report.json`` has ``report.settings.yaml``."""
    return Path(output).with_suffix(".settings.yaml")


def help_text(configs: Path, name: str, schema: type) -> str:
    """The commented defaults file, the files of each group, and the reducers that have a preset."""
    lines = [_read_text(configs / f"{name}.yaml").rstrip(), ""]
    groups = sorted(path for path in configs.iterdir() if path.is_dir())
    lines += [
        f"# {group.name}= one of: {', '.join(_group_files(group))}" for group in groups if _is_group(schema, group.name)
    ]
    if presets := _group_files(configs / name):
        lines += [f"# reducers with defaults of their own (configs/{name}/): {', '.join(presets)}"]
    lines += ["# --validate resolves and prints the settings, then stops; config=FILE reads more settings from a file."]
    return "\n".join(lines) + "\n"


def _group_files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {word!r}: settings are written key=value, for example keep=64")
    return key, value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings file {path}: {_one_line(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # the YAML parser's errors share no base with OmegaConf's
        raise UserError(f"settings file {path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"settings file {path} holds no key: value pairs")
    return {str(key): value for key, value in content.items()}


def _merge(target: Any, schema: type, values: Mapping[str, Any], configs: Path, origin: str) -> Any:
    """Merge ``values`` over ``target``, expanding groups; ``origin`` says where an error came from."""
    for key in _keys(schema, values):
        raise _unknown(schema, key, origin)
    fresh: Any = OmegaConf.structured(schema)
    for key, value in values.items():
        if _is_group(schema, key) and isinstance(value, str) and value != MISSING:
            value = _group(schema, key, value, configs)
            target[key] = fresh[key]  # a newly chosen group forgets the one chosen before
        elif _is_group(schema, key) and _renamed(target[key], value):
            target[key].options = {}  # they are those of what had been chosen
        try:
            target = OmegaConf.merge(target, {key: value})
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"bad value in {origin}: {_one_line(error)}") from error
    return target


def _renamed(group: Any, value: Any) -> bool:
    """Whether ``value`` chooses another name in a group that has options of its name."""
    return isinstance(value, Mapping) and "options" in group and value.get("name", group.name) != group.name


def _group(schema: type, key: str, value: str, configs: Path) -> dict[str, Any]:
    """The contents of group ``key`` that the word ``value`` stands for."""
    kind = _types(schema)[key]
    file = configs / key / f"{value}.yaml"
    plain_word = Path(value).name == value
    if plain_word and file.is_file():
        content = _read_yaml(file)
        for wrong in _keys(kind, content):
            raise _unknown(kind, wrong, str(file))
        return content
    if "name" in _types(kind):
        return {"name": value}
    known = ", ".join(_group_files(configs / key)) or "none"
    raise UserError(f"no settings file {file} for {key}={value}: there are {known}")


def _types(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(schema)}


def _is_group(schema: type, key: str) -> bool:
    return dataclasses.is_dataclass(_types(schema).get(key))


def _keys(schema: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of ``values`` that ``schema`` does not have."""
    known = _types(schema)
    for key, value in values.items():
        if key not in known:
            yield prefix + key
        elif dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):
            yield from _keys(typing.cast("type", known[key]), value, f"{prefix}{key}.")


def _dotted(schema: type, prefix: str = "") -> Iterator[str]:
    for key, kind in _types(schema).items():
        yield prefix + key
        if dataclasses.is_dataclass(kind):
            yield from _dotted(typing.cast("type", kind), f"{prefix}{key}.")


def _unknown(schema: type, key: str, origin: str) -> UserError:
    known = list(_dotted(schema))
    # The last part counts too: `learning_rte` should find `optimizer.learning_rate`.
    near = max(known, key=lambda name: _alike(name, key) + _alike(name.rpartition(".")[2], key.rpartition(".")[2]))
    return UserError(f"unknown setting {key} in {origin}: did you mean {near}? (--help lists the settings)")


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def _parse(schema: type, key: str, text: str) -> Any:
    """Read ``text`` by the type of setting ``key``: text stays as typed, everything else is YAML."""
    kind: Any = schema
    for part in key.split("."):
        kind = _types(kind).get(part, Any) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else Any
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = set(typing.get_args(kind)) if union else {kind}
    if type(None) in options and text in ("null", "none", ""):
        return None
    if str in options or dataclasses.is_dataclass(kind):
        return _escape(text)
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:  # as in _read_yaml
        raise UserError(f"cannot read the value in {key}={text}: {_one_line(error)}") from error
    value = parsed["value"]
    many = any(typing.get_origin(option) is list for option in options)
    return [value] if many and isinstance(value, str | int | float) else value  # keep=64 means keep=[64]


def _escape(value: Any) -> Any:
    """Keep ``${`` in texts literal: a prompt is never an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
