"""The plug-in: a folder of three files that carries a reducer to another machine."""

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from lit_reduce import hub
from lit_reduce.card import model_card
from lit_reduce.errors import UserError
from lit_reduce.files import PathLike, atomic_folder
from lit_reduce.reducer import Reducer, available, create, find
from lit_reduce.registry import plugin_folders
from lit_reduce.version import __version__

CONFIG, WEIGHTS, CARD = "reducer_config.json", "reducer.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
FORMAT_VERSION = 1
POSITIONS = ("keep", "renumber")


@dataclass
class BackboneId:
    """Which backbone a plug-in was trained on.

    Attributes:
        id: Hub id or short name.
        hash: SHA-256 over its weights.
        family: Model type, such as ``llava``.
        hidden_size: Width of the language model, and so of the projected visual tokens.
        vision_hidden_size: Width of the vision tower.
        tokens: Visual tokens of one image; 0 where that depends on its size.
        depth: Layers of the language model; 0 in files written before this was recorded.
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
    """Everything about a plug-in but its weights; the content of ``reducer_config.json``.

    Attributes:
        reducer: Name in the register.
        options: Settings of the reducer.
        backbone: What it was trained on.
        budgets: Counts of kept tokens seen in training.
        positions: ``keep`` (kept tokens keep their original positions) or ``renumber``.
        metrics: Measured results for the card: ``{column: {budget: value}}``, single values under their own name.
        library_version: Version that wrote the files.
        format_version: Version of this layout.
        weights_sha256: Ties the two files together; a mixture of two saves is refused.
    """

    reducer: str
    options: dict[str, Any]
    backbone: BackboneId
    budgets: list[int]
    positions: str = "keep"
    metrics: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION
    weights_sha256: str = ""


# Absent in files written before they existed, or by hand: their defaults say the right thing.
_OPTIONAL = {"metrics", "weights_sha256", "library_version", "depth"}


def save_plugin(
    folder: PathLike,
    reducer: Reducer,
    plugin_config: PluginConfig,
    card_extra: Mapping[str, Any] | str | None = None,
) -> Path:
    """Write config, weights and model card; each file replaces an older one whole or not at all.

    The reducer's own name and settings are what is written, whatever ``plugin_config`` says about them.

    Args:
        folder: Where to; other files there are left alone.
        reducer: Only its own ``state_dict`` is saved.
        plugin_config: What else the config file says.
        card_extra: Header entries for the card (``license``, ...) and ``notes`` for its body, or the notes alone.

    Raises:
        UserError: the folder cannot be written.
    """
    # Cloned, because tied or sliced tensors share storage, which safetensors rightly refuses.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in reducer.state_dict().items()}
    weights = safetensors.save(state, metadata={"format": "pt"})
    config = dataclasses.replace(
        plugin_config,
        reducer=reducer.name,
        options=dataclasses.asdict(reducer.config),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = json.dumps(_plain(dataclasses.asdict(config)), indent=2, sort_keys=True, allow_nan=False) + "\n"
    extra = {"notes": card_extra} if isinstance(card_extra, str) else dict(card_extra or {})
    # Inside the tower every tile is an image of its own; models that cut into tiles name no number of tokens.
    unit = "tile of an image" if reducer.site == "encoder" and not config.backbone.tokens else "image"
    card = model_card(dataclasses.asdict(config), reducer.paper, _parameters(reducer), extra, unit)
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(weights)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")
    return Path(folder)


def load_plugin(
    path_or_hub_id: PathLike,
    revision: str | None = None,
    backbone: BackboneId | None = None,
    local_files_only: bool = False,
) -> tuple[Reducer, PluginConfig]:
    """Read a plug-in from a folder or from the hub; nothing in it is ever executed.

    Args:
        path_or_hub_id: A folder that exists, ``REFERENCE/PLUGIN`` of an installed package (`lit_reduce.registry`), or
            ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.
        backbone: The backbone it shall serve; None skips the comparison.
        local_files_only: Use what was downloaded earlier, ask no server.

    Returns:
        The reducer, on the CPU, in evaluation mode and in the dtype it was saved in, and the config.

    Raises:
        UserError: missing, corrupt or mixed files, an unknown reducer, or another backbone.
    """
    folder = _locate(path_or_hub_id, revision, local_files_only)
    config = read_config(folder)
    if backbone is not None:
        check_backbone(config, backbone)
    state = _read_weights(folder, config)
    return _build(folder, config, state), config


def open_reducer(
    named: Reducer | PathLike,
    options: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[Reducer, PluginConfig | None]:
    """What a user means by a reducer: the object itself, a name in the register, or a plug-in's folder or hub id.

    Args:
        named: One of these. A word that is in the register means that reducer even where a folder is called so; write
            ``./word`` for the folder.
        options: For a reducer that is made by name; a plug-in carries its own.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The reducer, evaluating, and what its plug-in says, if it comes from one: not yet checked against a backbone.

    Raises:
        UserError: not found, not readable, options that do not fit, or a name whose weights must come from a plug-in.
    """
    if isinstance(named, Reducer):
        return named, None
    name = str(named)
    if isinstance(named, str) and "/" not in name:
        if name in available():
            if find(name).trained:
                shipped = next((known for known in plugin_folders() if known.endswith(f"/{name}")), f"FOLDER/{name}")
                raise UserError(f"reducer {name} must be trained: give the folder or hub id of a plug-in, as {shipped}")
            return create(name, **(options or {})).eval(), None
        if not Path(name).exists():
            find(name)  # raises, with the nearest name
    if options:
        raise UserError(f"reducer.options cannot change the plug-in {name}: it carries its own")
    return load_plugin(named, revision)


def push_to_hub(
    folder: PathLike, repo_id: str, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload the three files of a plug-in, after checking that they load.

    Args:
        folder: A saved plug-in.
        repo_id: ``owner/name``; made if it is not there yet.
        private: Visibility of a new repository.
        revision: Branch to write to, made if it is not there; None is the default branch.
        message: Commit message.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder holds no sound plug-in, or the hub says no.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; save the plug-in first, then push that folder")
    _, config = load_plugin(folder)
    return hub.upload(folder, repo_id, FILES, private, revision, message or f"Upload {config.reducer} plug-in")


def create_for(backbone: BackboneId, name: str, options: Mapping[str, Any]) -> Reducer:
    """A fresh reducer; widths and the depth that its options leave open are the backbone's.

    Raises:
        UserError: an unknown name or option.
    """
    fields = find(name).config_class.__dataclass_fields__
    chosen = dict(options)
    for key in {"hidden_size", "vision_hidden_size", "depth"} & set(fields):
        chosen[key] = chosen.get(key) or getattr(backbone, key)
    return create(name, **chosen)


def read_config(folder: PathLike) -> PluginConfig:
    """Read and check ``reducer_config.json``; entries of a newer version are dropped with a warning.

    Raises:
        UserError: missing or corrupt file, a missing or mistyped entry.
    """
    path = Path(folder) / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({_brief(error)}); is this the folder of a plug-in?") from error
    config = _typed(PluginConfig, raw, path)
    if config.format_version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {config.format_version}, this lit_reduce ({__version__}) reads up to {FORMAT_VERSION};"
            " upgrade lit_reduce"
        )
    if config.positions not in POSITIONS:
        raise UserError(f"{path}: positions must be one of {', '.join(POSITIONS)}, not '{config.positions}'")
    return config


def check_backbone(config: PluginConfig, backbone: BackboneId) -> None:
    """Refuse to serve a backbone that the plug-in was not trained on.

    Raises:
        UserError: another width, vision width or set of weights.
    """
    ours = config.backbone
    start = f"this {config.reducer} plug-in was trained on {ours.id}"
    for what, mine, theirs in (
        ("hidden size", ours.hidden_size, backbone.hidden_size),
        ("vision hidden size", ours.vision_hidden_size, backbone.vision_hidden_size),
    ):
        if mine != theirs:
            raise UserError(f"{start} with {what} {mine}, but {backbone.id} has {theirs}; train one for {backbone.id}")
    if ours.hash != backbone.hash:
        raise UserError(
            f"{start} (weights {ours.hash[:12]}), but {backbone.id} has other weights ({backbone.hash[:12]});"
            f" use that backbone or train a plug-in for this one"
        )


def _locate(place: PathLike, revision: str | None, local_files_only: bool) -> Path:
    folder = Path(place).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision} is for the hub, and {place} is a local folder; leave it out")
        return folder
    if folder.exists():
        raise UserError(f"{place} is a file; give the folder of the plug-in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(place)):
        raise UserError(f"no plug-in at {place}: there is no such folder, and it is no hub id of the form owner/name")
    shipped = None if revision is not None else plugin_folders().get(str(place))
    return shipped or hub.download(str(place), FILES, revision, local_files_only)


def _read_weights(folder: Path, config: PluginConfig) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
        if config.weights_sha256 not in ("", hashlib.sha256(data).hexdigest()):
            raise UserError(f"{path} is damaged, or {CONFIG} is of another save; save or fetch the plug-in again")
        return safetensors.load(data)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({_brief(error)}); save or fetch the plug-in again") from error


def _build(folder: Path, config: PluginConfig, state: dict[str, torch.Tensor]) -> Reducer:
    cls = find(config.reducer)
    known = {entry.name for entry in dataclasses.fields(cls.config_class)}
    options = {key: value for key, value in config.options.items() if key in known}
    _warn_dropped(set(config.options) - known, folder / CONFIG)
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are thrown away; the caller's random stream is not ours
            reducer = cls(cls.config_class.from_options(options, owner=f"{folder / CONFIG}: {config.reducer}"))
        # Assigned, not copied into: a copy would silently cast weights that were saved in another dtype.
        reducer.load_state_dict(state, strict=True, assign=True)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{folder}: weights and config do not fit together: {_brief(error)}") from error
    return reducer.eval()


_T = TypeVar("_T")


def _typed(schema: type[_T], raw: Any, path: Path) -> _T:
    """A dataclass from parsed JSON: unknown keys warn, missing and mistyped ones are errors."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {schema.__name__} must be an object of named values; fetch the plug-in again")
    kinds = {entry.name: entry.type for entry in dataclasses.fields(schema)}  # type: ignore[arg-type]
    _warn_dropped(set(raw) - set(kinds), path)
    missing = sorted(set(kinds) - set(raw) - _OPTIONAL)
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}; save the plug-in again or fetch it again")
    values: dict[str, Any] = {}
    for key in kinds.keys() & raw.keys():
        kind: Any = kinds[key]
        value: Any = _typed(BackboneId, raw[key], path) if kind is BackboneId else raw[key]
        plain = getattr(kind, "__origin__", kind)
        wrong = not isinstance(value, plain) or (isinstance(value, bool) and plain is int)
        if wrong or (key == "budgets" and not all(type(count) is int for count in value)):
            raise UserError(f"{path}: '{key}' must be of type {getattr(kind, '__name__', kind)}, not {value!r}")
        values[key] = value
    return schema(**values)


def _warn_dropped(unknown: set[str], path: Path) -> None:
    if unknown:
        names = ", ".join(sorted(unknown))
        warnings.warn(f"{path}: ignoring unknown entries {names}; a newer lit_reduce may understand them", stacklevel=4)


def _plain(value: Any) -> Any:
    """The same value as JSON can hold it: numbers that are not finite become null, keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parameters(reducer: Reducer) -> int:
    return sum(parameter.numel() for parameter in reducer.parameters())


def _brief(error: BaseException) -> str:
    """The first telling lines of an error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
