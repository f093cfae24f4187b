"""What gave the answers in a file: settings, and model and reducer by their content, so that none are mixed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_reduce.backbones import Backbone
from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.plugin import resolved_revision
from lit_reduce.settings import to_yaml
from lit_reduce.settings.predict import PredictSettings
from lit_reduce.version import __version__

MARK = "# answered with "  # in a comment, so that the file can be given back with config=FILE


def settings_file(output: str | Path) -> Path:
    """Where the settings of ``output`` are saved: beside it, under its whole name, which no report's settings have."""
    return Path(f"{output}.settings.yaml")


def resolved(settings: PredictSettings, backbone: Backbone) -> PredictSettings:
    """The settings with the commits that the hub ids of backbone and reducer stood for."""
    commit = getattr(backbone.model.config, "_commit_hash", None) or settings.backbone.revision
    reducer = settings.reducer
    return replace(
        settings,
        backbone=replace(settings.backbone, revision=commit),
        reducer=replace(reducer, revision=resolved_revision(reducer.name, reducer.revision)),
    )


def save_with(settings: PredictSettings, output: str | Path, backbone: Backbone, spec: ReducerSpec) -> None:
    """Save the settings of ``output`` and what they stood for.

    Raises:
        UserError: The file cannot be written.
    """
    facts = json.dumps(_facts(settings, backbone, spec))
    write_atomic(settings_file(output), f"{MARK}{facts}\n{to_yaml(settings)}")


def check_same(settings: PredictSettings, output: Path, backbone: Backbone, spec: ReducerSpec) -> None:
    """Refuse to go on with answers that other settings, another model or another reducer gave.

    Raises:
        UserError: They did, or nothing says what did.
    """
    saved, now = settings_file(output), _facts(settings, backbone, spec)
    try:
        head = saved.read_text(encoding="utf-8").partition("\n")[0]
        before: Any = json.loads(head.removeprefix(MARK)) if head.startswith(MARK) else None
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{output} holds answers, but {saved} does not say what gave them: give another output")
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(f"{output} was begun with another {name} (see {saved}): give another output")


def _facts(settings: PredictSettings, backbone: Backbone, spec: ReducerSpec) -> dict[str, Any]:
    """Everything that decides an answer, by the name of the setting."""
    fingerprint = spec.fingerprint
    reducer = hashlib.sha256(repr(fingerprint[:-1]).encode()).hexdigest() if fingerprint else "none"
    return {
        "backbone": backbone.identity.hash,
        "backbone.dtype": str(backbone.model.dtype),
        "reducer": reducer,
        "keep": spec.keep,
        "max_new_tokens": settings.max_new_tokens,
        "lit_reduce version": __version__,
    }
