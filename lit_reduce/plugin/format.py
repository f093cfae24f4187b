"""The content of ``reducer_config.json``: its dataclasses, its versions, and a typed reader."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_reduce.errors import UserError
from lit_reduce.files import PathLike, read_plain
from lit_reduce.version import __version__

CONFIG, WEIGHTS, CARD = "reducer_config.json", "reducer.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
FORMAT_VERSION = 1
POSITIONS = ("keep", "renumber")
MAX_BYTES = 1 << 22  # of the config


@dataclass
class BackboneId:
    """Identity of the backbone that a plug-in was trained on.

    Attributes:
        id: Hub id or short name.
        hash: SHA-256 over its weights.
        family: Model type, such as ``llava``.
        hidden_size: Width of the language model, and so of the projected visual tokens.
        vision_hidden_size: Width of the vision tower.
        tokens: Visual tokens of one image; 0 if the count depends on the image size.
        depth: Layers of the language model; 0 in files that do not record it.
    """

    id: str
    hash: str
    family: str
    hidden_size: int
    vision_hidden_size: int
    tokens: int
    depth: int = 0


@dataclass
class PluginConfig:
    """Everything that a plug-in stores beside its weights.

    Attributes:
        reducer: Name in the register.
        options: Settings of the reducer.
        backbone: The backbone that it was trained on.
        budgets: Numbers of kept tokens seen in training, or ratios.
        positions: ``keep`` (kept tokens keep their original positions) or ``renumber``.
        metrics: Measured results for the card: ``{column: {budget: value}}``, single values under their own name.
        library_version: Version of lit_reduce that wrote the files.
        format_version: Version of this layout.
        weights_sha256: SHA-256 of the weights file, so that files of two saves cannot be mixed.
    """

    reducer: str
    options: dict[str, Any]
    backbone: BackboneId
    budgets: list[int | float]
    positions: str = "keep"
    metrics: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION
    weights_sha256: str = ""


# Entries that older or hand-written files may lack; their defaults are right for these files.
_OPTIONAL = {"metrics", "weights_sha256", "library_version", "depth"}


def read_config(folder: PathLike) -> PluginConfig:
    """Read and check ``reducer_config.json``; unknown entries are dropped with a warning.

    Raises:
        UserError: The file is missing or corrupt, or an entry is missing or has the wrong type.
    """
    path = Path(folder) / CONFIG
    try:
        raw = json.loads(read_plain(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); is this the folder of a plug-in?") from error
    config = _typed(PluginConfig, raw, path)
    if config.format_version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {config.format_version}, this lit_reduce ({__version__}) reads up to {FORMAT_VERSION};"
            " upgrade lit_reduce"
        )
    if config.positions not in POSITIONS:
        raise UserError(f"{path}: positions must be one of {', '.join(POSITIONS)}, not '{config.positions}'")
    return config


def dump_config(config: PluginConfig) -> str:
    """Return the text of ``reducer_config.json``: sorted keys, and null for numbers that are not finite."""
    return json.dumps(_plain(dataclasses.asdict(config)), indent=2, sort_keys=True, allow_nan=False) + "\n"


def warn_dropped(unknown: set[str], path: Path) -> None:
    """Warn about entries of ``path`` that this version does not know."""
    if unknown:
        names = ", ".join(sorted(unknown))
        warnings.warn(f"{path}: ignoring unknown entries {names}; a newer lit_reduce may understand them", stacklevel=4)


def brief(error: BaseException) -> str:
    """The first two lines of an error message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


_T = TypeVar("_T")


def _typed(schema: type[_T], raw: Any, path: Path) -> _T:
    """Build a dataclass from parsed JSON; unknown keys warn, missing and mistyped ones raise."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {schema.__name__} must be an object of named values; fetch the plug-in again")
    kinds = {entry.name: entry.type for entry in dataclasses.fields(schema)}  # type: ignore[arg-type]
    warn_dropped(set(raw) - set(kinds), path)
    missing = sorted(set(kinds) - set(raw) - _OPTIONAL)
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}; save the plug-in again or fetch it again")
    values: dict[str, Any] = {}
    for key in kinds.keys() & raw.keys():
        kind: Any = kinds[key]
        value: Any = _typed(BackboneId, raw[key], path) if kind is BackboneId else raw[key]
        plain = getattr(kind, "__origin__", kind)
        wrong = not isinstance(value, plain) or (isinstance(value, bool) and plain is int)
        if wrong or (key == "budgets" and not all(type(count) in (int, float) for count in value)):
            raise UserError(
                f"{path}: '{key}' must be of type {getattr(kind, '__name__', kind)}, not {repr(value)[:100]}"
            )
        values[key] = value
    return schema(**values)


def _plain(value: Any) -> Any:
    """The same value as JSON can hold it: numbers that are not finite become None, keys become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
