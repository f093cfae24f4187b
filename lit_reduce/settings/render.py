"""Settings as text: resolved values as YAML, and defaults with their comments for ``--help``, files and Markdown."""

import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_reduce.files import write_atomic
from lit_reduce.options import limits_of
from lit_reduce.settings.presets import preset_names
from lit_reduce.settings.schema import types_of
from lit_reduce.settings.words import escape

WIDTH = 120
FROM_BACKBONE = ("hidden_size", "vision_hidden_size", "depth")
FOOT = "--validate resolves and prints the settings, then stops; config=FILE reads more settings from a file."


def to_yaml(settings: object) -> str:
    """Resolved settings as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(escape(dataclasses.asdict(typing.cast("Any", settings)))))


def save(settings: object, path: str | Path) -> None:
    """Write resolved settings as YAML; the file can be given back with ``config=FILE``."""
    write_atomic(path, to_yaml(settings))


def beside(output: str | Path) -> Path:
    """Where the settings that made ``output`` are saved: ``report.json`` has ``report.settings.yaml``."""
    return Path(output).with_suffix(".settings.yaml")


def help_text(configs: Path, schema: type) -> str:
    """The commented defaults, then the files of each group and the presets that there are."""
    lines = [commented(schema)]
    if names := sorted(path.stem for path in (configs / "backbone").glob("*.yaml")):
        lines.append(f"# backbone= also one of: {', '.join(names)} (configs/backbone/)")
    if "preset" in types_of(schema):
        lines.append(f"# preset= one of: {', '.join([*preset_names(configs), 'none'])} (configs/preset/)")
    return "\n".join([*lines, f"# {FOOT}"]) + "\n"


def commented(schema: type) -> str:
    """The defaults of a schema as YAML; above each value what it means and what is allowed, on top its docstring."""
    about = inspect.cleandoc(schema.__doc__ or "").splitlines()
    head = [f"# {line}".rstrip() for line in about]
    return "\n".join([*head, "", *_yaml_lines(schema(), "")]) + "\n"


def commented_options(name: str, about: str, schema: type) -> str:
    """The options of a reducer as YAML, like `commented`.

    Args:
        name: The reducer.
        about: What it is.
        schema: Its settings.
    """
    head = [f"# {line}" for line in textwrap.wrap(about, WIDTH - 2)]
    return "\n".join([*head, f"name: {name}", "options:", *_yaml_lines(schema(), "  ")]) + "\n"


def markdown(schema: type) -> str:
    """A table of the settings of a schema: name, default, meaning and what is allowed."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for key, value, metadata in leaves(schema()):
        meaning = _meaning(metadata).replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | `{as_yaml(value)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Dotted key, value and metadata of every setting, those of groups included."""
    for entry in user_fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, entry.metadata


def as_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    if isinstance(value, str) and value and OmegaConf.create(f"text: [{value}]") == {"text": [value]}:
        return value
    return json.dumps(value)


def _yaml_lines(settings: Any, indent: str) -> Iterator[str]:
    for entry in user_fields(settings):
        value = getattr(settings, entry.name)
        meaning = textwrap.wrap(_meaning(entry.metadata), WIDTH - len(indent) - 2)
        yield from (f"{indent}# {line}" for line in meaning)
        if dataclasses.is_dataclass(value):
            yield f"{indent}{entry.name}:"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{as_yaml(entry.name)}: {as_yaml(value)}"  # quoted where YAML would read it as true, as on


def user_fields(settings: Any) -> list[dataclasses.Field[Any]]:
    """The fields that a user sets; the sizes of a reducer that follow from the backbone are not among them."""
    return [entry for entry in dataclasses.fields(settings) if entry.name not in FROM_BACKBONE]


def _meaning(metadata: Mapping[str, Any]) -> str:
    limits = limits_of(metadata)
    if "choices" in metadata:
        limits = f"one of {limits}"
    return f"{metadata.get('help', '')} ({limits})" if limits else str(metadata.get("help", ""))
