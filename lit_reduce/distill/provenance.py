"""What decides the weights of a training run; each checkpoint holds it, so that no other run goes on from there."""

import dataclasses
import hashlib
import json
from typing import Any

from lightning import Callback, Trainer

from lit_reduce.backbones import identify
from lit_reduce.distill.data import DistillData
from lit_reduce.errors import UserError
from lit_reduce.plugin import load_plugin
from lit_reduce.plugin.checks import not_finite, state_digest
from lit_reduce.reducer import Reducer
from lit_reduce.settings.train import TrainSettings
from lit_reduce.version import __version__

KEY = "lit_reduce"  # the entry of a checkpoint
FREE = frozenset({
    "output", "preset", "lr_find", "save_every", "logger", "accelerator", "checkpointing", "table_budgets", "baselines",
    "table_batch", "runs",
})  # fmt: skip
"""Settings that change nothing in the weights; every other one, also a future one, decides them."""


def run_facts(settings: TrainSettings, model: Any, reducer: Reducer, data: DistillData) -> dict[str, str]:
    """Everything that decides the result, by the name of the setting; files and models count by their content."""
    free = FREE if settings.patience is not None else FREE | {"val_every", "val_budgets"}
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    groups = [*data.groups, *(() if settings.patience is None else data.val_groups)]
    values |= {
        "backbone": [identify(model).hash, str(model.dtype)],
        "reducer": reducer.name,
        "reducer.options": vars(reducer.config),
        "data": hashlib.sha256("\n".join(group.key for group in groups).encode()).hexdigest(),
        "library version": __version__,
    }
    if settings.init_from is not None:
        values["init_from"] = state_digest(load_plugin(settings.init_from)[0].state_dict())
    flat: dict[str, str] = {}
    for name, value in values.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: json.dumps(each, default=str, sort_keys=True) for key, each in inner.items()}
    return flat


def differences(before: dict[str, str], now: dict[str, str]) -> str:
    """The names of what differs, with both values where they are short; "" where nothing does."""

    def shown(name: str) -> str:
        pair = [facts.get(name, "not set") for facts in (before, now)]
        return name if max(map(len, pair)) > 32 else f"{name} ({pair[0]}, now {pair[1]})"

    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return ", ".join(map(shown, names))


class Provenance(Callback):
    """Adds the facts to each checkpoint; refuses to write one with weights that are not finite."""

    def __init__(self, facts: dict[str, str]) -> None:
        """Prepare the callback; ``facts`` are those of `run_facts`."""
        self.facts = facts

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the facts.

        Raises:
            UserError: Training has diverged; the checkpoint before this one stays.
        """
        if broken := not_finite(pl_module.reducer.state_dict()):
            raise UserError(
                f"training has diverged at step {trainer.global_step}: {broken}; the last checkpoint stays as it was; "
                "try a lower learning_rate in another output"
            )
        checkpoint[KEY] = self.facts
