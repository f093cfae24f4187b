"""Where the figures of training go: a CSV file that a resumed run continues, TensorBoard or Weights & Biases."""

import csv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_reduce.errors import UserError


class ContinuedCSV(CSVLogger):
    """Writes every row at once, so that a kill loses none, and keeps the rows of the run that it resumes.

    Lightning's own starts the file afresh. Rows from the step on at which the resumed run logs first are its own.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare ``folder/log/metrics.csv``."""
        super().__init__(folder, name="log", version="", flush_logs_every_n_steps=1)
        path = folder / "log" / "metrics.csv"
        self.older = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes a row, before the first one those of the earlier run."""
        older, self.older = self.older, []
        for row in older:
            at = int(row.pop("step") or 0)
            if step is not None and at < step:
                super().log_metrics({name: float(value) for name, value in row.items() if value}, at)
        super().log_metrics(metrics, step)


def _tensorboard(folder: Path) -> Any:
    _needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="log", version="")


def _wandb(folder: Path) -> Any:
    _needs("wandb")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(save_dir=folder, project="lit_reduce")


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"the logger {package} is not installed: pip install 'lit-reduce[loggers]'")


LOGGERS: dict[str, Callable[[Path], Any]] = {"csv": ContinuedCSV, "tensorboard": _tensorboard, "wandb": _wandb}
