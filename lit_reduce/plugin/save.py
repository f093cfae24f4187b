"""Saving a plug-in to a folder and uploading it to the hub."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors

from lit_reduce.errors import UserError
from lit_reduce.files import PathLike, atomic_folder
from lit_reduce.plugin import hub
from lit_reduce.plugin.card import model_card
from lit_reduce.plugin.checks import not_finite
from lit_reduce.plugin.format import CARD, CONFIG, FILES, WEIGHTS, PluginConfig, dump_config
from lit_reduce.plugin.load import load_plugin
from lit_reduce.reducer import Reducer


def save_plugin(
    folder: PathLike,
    reducer: Reducer,
    plugin_config: PluginConfig,
    card_extra: Mapping[str, Any] | str | None = None,
) -> Path:
    """Write config, weights and model card; each file is replaced whole or not at all.

    The name and the settings in the config file are those of the reducer, whatever ``plugin_config`` says about them.

    Args:
        folder: Target folder; other files in it are left alone.
        reducer: Its ``state_dict`` is saved.
        plugin_config: The other entries of the config file.
        card_extra: Header entries for the card (``license``, ...) and ``notes`` for its body, or the notes alone.

    Raises:
        UserError: A weight is not finite, or the folder cannot be written.
    """
    # Cloned, because tied or sliced tensors share storage, which safetensors refuses.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in reducer.state_dict().items()}
    if broken := not_finite(state):
        raise UserError(f"cannot save {folder}: {broken}; the weights are of no use")
    weights = safetensors.save(state, metadata={"format": "pt"})
    config = dataclasses.replace(
        plugin_config,
        reducer=reducer.name,
        options=dataclasses.asdict(reducer.config),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    extra = {"notes": card_extra} if isinstance(card_extra, str) else dict(card_extra or {})
    # Inside the tower every tile is an image of its own; models that cut images into tiles have no fixed token count.
    unit = "tile of an image" if reducer.site == "encoder" and not config.backbone.tokens else "image"
    parameters = sum(parameter.numel() for parameter in reducer.parameters())
    card = model_card(dataclasses.asdict(config), reducer.paper, parameters, extra, unit)
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(weights)
        (temporary / CONFIG).write_text(dump_config(config), encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")
    return Path(folder)


def push_to_hub(
    folder: PathLike, repo_id: str, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload the three files of a plug-in, after checking that they load.

    Args:
        folder: A saved plug-in.
        repo_id: ``owner/name``; created if it does not exist.
        private: Visibility of a new repository.
        revision: Branch to write to, created if it does not exist; None is the default branch.
        message: Commit message.

    Returns:
        The URL of the commit.

    Raises:
        UserError: The folder holds no valid plug-in, or the hub refuses.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; save the plug-in first, then push that folder")
    _, config = load_plugin(folder)
    return hub.upload(folder, repo_id, FILES, private, revision, message or f"Upload {config.reducer} plug-in")
