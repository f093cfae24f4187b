"""Fields of settings dataclasses: default, help and limits in one place, and one function that checks values."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from lit_reduce.errors import UserError


def option(  # the names of the limits are those of JSON Schema where it has them
    default: Any,
    help: str,  # noqa: A002
    *,
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    min_items: int = 0,
    was: str = "",
) -> Any:
    """A dataclass field that carries its own documentation and limits.

    Limits and choices hold for each entry of a list; None passes, where the type allows it.

    Args:
        default: The default value; of a list or dict each instance gets a copy. A class or function is called for it.
        help: What the value means, in one sentence.
        min: Smallest number.
        max: Largest number.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        choices: The only values.
        min_items: Fewest entries of a list.
        was: The name that the field had in earlier versions.
    """
    limits = {"min": min, "max": max, "above": above, "below": below}
    metadata: dict[str, Any] = {"help": help, **{name: limit for name, limit in limits.items() if limit is not None}}
    metadata |= {
        name: value for name, value in (("choices", tuple(choices)), ("min_items", min_items), ("was", was)) if value
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(settings: Any, owner: str = "", prefix: str = "") -> None:
    """Checks every value of a settings dataclass, nested groups included, against the limits of its field.

    Args:
        settings: The dataclass instance.
        owner: Whose settings these are, for the error.
        prefix: What stands before the names in the error, as ``data.``.

    Raises:
        UserError: A value that is not allowed; names the setting, the value and what is allowed.
    """
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            check(value, owner, f"{prefix}{entry.name}.")
        else:
            check_value(entry.metadata, prefix + entry.name, value, owner)


def check_value(metadata: Mapping[str, Any], name: str, value: Any, owner: str = "") -> None:
    """Checks one value against the metadata of its field.

    Raises:
        UserError: It is not allowed.
    """
    if value is not None and not _allowed(metadata, value):
        start = f"{owner}: " if owner else ""
        verb = "use" if "choices" in metadata else "give"
        raise UserError(f"{start}{name}={value}: {verb} {limits_of(metadata)}")


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field; a whole number is a float too, a bool is no number."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of_type(item, inner[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return not isinstance(origin or kind, type) or isinstance(value, origin or kind)


def limits_of(metadata: Mapping[str, Any]) -> str:
    """What a field allows, in words: ``1 or more``, ``above 0 and below 1``, ``keep, renumber``; "" for anything."""
    if "choices" in metadata:
        return ", ".join(str(choice) for choice in metadata["choices"])
    low = f"above {metadata['above']}" if "above" in metadata else ""
    if "min" in metadata:
        low = f"{metadata['min']} to {metadata['max']}" if "max" in metadata else f"{metadata['min']} or more"
    high = f"below {metadata['below']}" if "below" in metadata else ""
    if "max" in metadata and "min" not in metadata:
        high = f"at most {metadata['max']}"
    words = " and ".join(part for part in (low, high) if part)
    if not (count := metadata.get("min_items")):
        return words
    return f"{count} value{'s' if count > 1 else ''} at least{', each ' if words else ''}{words}"


def former_names(schema: type) -> dict[str, str]:
    """Earlier names of the fields of a dataclass, with those of today."""
    return {entry.metadata["was"]: entry.name for entry in dataclasses.fields(schema) if "was" in entry.metadata}


def with_current_names(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, those under earlier names of the fields moved to the names of today."""
    former = former_names(schema)
    return {former.get(key, key): value for key, value in values.items()}


def _allowed(metadata: Mapping[str, Any], value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) >= metadata.get("min_items", 0) and all(_allowed(metadata, item) for item in value)
    if "choices" in metadata:
        return value in metadata["choices"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        metadata.get("min", value) <= value <= metadata.get("max", value)
        and not ("above" in metadata and value <= metadata["above"])
        and not ("below" in metadata and value >= metadata["below"])
    )
