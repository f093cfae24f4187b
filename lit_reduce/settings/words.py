"""Reading what the user wrote: ``key=value`` words and YAML files."""

import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_reduce.errors import UserError
from lit_reduce.settings.schema import type_at


def split(word: str) -> tuple[str, str]:
    """Key and value of a word.

    Raises:
        UserError: It has another form.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {word!r}: settings are written key=value, for example keep=64")
    return key, value


def parse(schema: type, key: str, text: str) -> Any:
    """Read ``text`` by the type of setting ``key``: text stays as typed, everything else is YAML.

    Raises:
        UserError: It is no YAML.
    """
    kind = type_at(schema, key)
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = set(typing.get_args(kind)) if union else {kind}
    if type(None) in options and text in ("null", "none", ""):
        return None
    if str in options or (isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")):
        return escape(text)
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:  # as in read_yaml
        raise UserError(f"cannot read the value in {key}={text}: {one_line(error)}") from error
    value = parsed["value"]
    many = any(typing.get_origin(option) is list for option in options)
    return [value] if many and isinstance(value, str | int | float) else value  # keep=64 means keep=[64]


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a settings file.

    Raises:
        UserError: It cannot be read, is no YAML, or holds something else than ``key: value`` pairs.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings file {path}: {one_line(error)}") from error
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # the YAML parser's errors share no base with OmegaConf's
        raise UserError(f"settings file {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"settings file {path} holds no key: value pairs")
    return {str(key): value for key, value in content.items()}


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key as nested mappings."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def escape(value: Any) -> Any:
    """Keep ``${`` in texts literal: a prompt is never an interpolation."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
