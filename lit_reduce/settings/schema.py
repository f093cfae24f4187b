"""What a settings dataclass says about its keys: their types, groups, former names, and the nearest to a wrong one."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.options import former_names


def types_of(schema: type) -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(schema)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(schema)}


def is_group(schema: type, key: str) -> bool:
    """Whether a field holds settings of its own."""
    return dataclasses.is_dataclass(types_of(schema).get(key))


def type_at(schema: type, key: str) -> Any:
    """The type of a dotted key; Any for one that the schema does not have."""
    kind: Any = schema
    for part in key.split("."):
        kind = types_of(kind).get(part, Any) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else Any
    return kind


def check_keys(schema: type, values: Mapping[str, Any], origin: str) -> None:
    """Refuses keys that a schema does not have, nested ones too.

    Raises:
        UserError: Such a key: says its name of today where it was renamed, else the nearest known one.
    """
    _check_keys(schema, schema, values, origin, "")


def _check_keys(schema: type, part: type, values: Mapping[str, Any], origin: str, prefix: str) -> None:
    known, former = types_of(part), former_names(part)
    for key, value in values.items():
        if key in former and key not in known:
            raise UserError(f"setting {prefix}{key} in {origin} is now called {prefix}{former[key]}: write that")
        if key not in known:
            raise _unknown(schema, prefix + key, origin)
        if dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):
            _check_keys(schema, typing.cast("type", known[key]), value, origin, f"{prefix}{key}.")


def _unknown(schema: type, key: str, origin: str) -> UserError:
    known = list(_dotted(schema))
    # The last part counts too: `learning_rte` should find `optimizer.learning_rate`.
    near = max(known, key=lambda name: _alike(name, key) + _alike(name.rpartition(".")[2], key.rpartition(".")[2]))
    return UserError(f"unknown setting {key} in {origin}: did you mean {near}? (--help lists the settings)")


def _dotted(schema: type, prefix: str = "") -> Iterator[str]:
    for key, kind in types_of(schema).items():
        yield prefix + key
        if dataclasses.is_dataclass(kind):
            yield from _dotted(typing.cast("type", kind), f"{prefix}{key}.")


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
