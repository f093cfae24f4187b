"""Loading a reducer: from a plug-in's folder, from the hub, or by its name in the register."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors

from lit_reduce.errors import UserError
from lit_reduce.files import PathLike, check_plain
from lit_reduce.options import with_current_names
from lit_reduce.plugin import hub
from lit_reduce.plugin.checks import check_backbone, not_finite
from lit_reduce.plugin.fit import check_fit
from lit_reduce.plugin.format import CONFIG, FILES, WEIGHTS, BackboneId, PluginConfig, brief, read_config, warn_dropped
from lit_reduce.reducer import Reducer, available, create, find
from lit_reduce.registry import plugin_folders

MAX_BYTES = 1 << 32  # of weights
SMALL = 1 << 20  # bytes that are read to tell damage from another format


def load_plugin(
    path_or_hub_id: PathLike,
    revision: str | None = None,
    backbone: BackboneId | None = None,
    local_files_only: bool = False,
) -> tuple[Reducer, PluginConfig]:
    """Load a plug-in from a folder or from the hub; no code of it is executed.

    Args:
        path_or_hub_id: An existing folder, ``REFERENCE/PLUGIN`` of an installed package (`lit_reduce.registry`), or
            ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.
        backbone: The backbone that it will serve; None skips the comparison.
        local_files_only: Use files that were downloaded earlier and contact no server.

    Returns:
        The reducer, on the CPU, in evaluation mode and in the dtype it was saved in, and the config.

    Raises:
        UserError: Missing, corrupt or mixed files, an unknown reducer, or another backbone.
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
    """Resolve a reducer object, a name in the register, or a plug-in's folder or hub id.

    Args:
        named: One of these. A word that is in the register means that reducer even if a folder has the same name; write
            ``./word`` for the folder.
        options: Settings for a reducer that is created by name; a plug-in carries its own.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The reducer in evaluation mode, and the config of its plug-in if it comes from one. The config is not yet
        compared with a backbone.

    Raises:
        UserError: Not found, not readable, options that do not fit, or a name whose weights must come from a plug-in.
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


def resolved_revision(name: str, revision: str | None) -> str | None:
    """The commit of a hub id that has been downloaded; for folders and names of the register, ``revision`` as it is."""
    if "/" not in name or Path(name).expanduser().exists() or (revision is None and name in plugin_folders()):
        return revision
    return _locate(name, revision, local_files_only=True).name


def create_for(backbone: BackboneId, name: str, options: Mapping[str, Any]) -> Reducer:
    """Create a reducer; widths and depth that its options leave at 0 are taken from the backbone.

    Raises:
        UserError: An unknown name or option.
    """
    fields = find(name).config_class.__dataclass_fields__
    resolved = dict(options)
    for key in {"hidden_size", "vision_hidden_size", "depth"} & set(fields):
        resolved[key] = resolved.get(key) or getattr(backbone, key)
    return create(name, **resolved)


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
        check_plain(path, MAX_BYTES)
        if path.stat().st_size > SMALL and not _has_sound_header(path):  # checked before all is read
            raise ValueError("its header does not fit its size")
        data = path.read_bytes()
        if config.weights_sha256 not in ("", hashlib.sha256(data).hexdigest()):
            raise UserError(f"{path} is damaged, or {CONFIG} is of another save; save or fetch the plug-in again")
        state = safetensors.load(data)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); save or fetch the plug-in again") from error
    if broken := not_finite(state):
        raise UserError(f"{path}: {broken}; train or fetch the plug-in again")
    return state


def _has_sound_header(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _build(folder: Path, config: PluginConfig, state: dict[str, torch.Tensor]) -> Reducer:
    cls = find(config.reducer)
    fields = dataclasses.fields(cls.config_class)
    config.options = with_current_names(cls.config_class, config.options)
    known = {entry.name for entry in fields}
    options = {key: value for key, value in config.options.items() if key in known}
    warn_dropped(set(config.options) - known, folder / CONFIG)
    try:
        settings = cls.config_class.from_options(options, owner=f"{folder / CONFIG}: {config.reducer}")
        check_fit(cls, settings, state)
        with torch.random.fork_rng(devices=[]):  # initial weights are replaced; keep the caller's random state
            reducer = cls(settings)
        # Assigned, not copied into: a copy would silently cast weights that were saved in another dtype.
        reducer.load_state_dict(state, strict=True, assign=True)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise UserError(f"{folder}: weights and config do not fit together: {brief(error)}") from error
    return reducer.eval()
