"""Loggers of training: a CSV file that a resumed run continues, TensorBoard, or Weights & Biases."""

import csv
import logging
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic


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


def run_id(folder: Path, step: int) -> str:
    """The name under which Weights & Biases knows the run: that of the run that is resumed, or a new one at step 0."""
    path = folder / "log" / "wandb-id"
    if step and path.is_file():
        return path.read_text().strip()
    name = secrets.token_hex(4)
    write_atomic(path, name + "\n")
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's notices about hardware, its tips and its advice on loaders from between our own lines.

    Batches are read from the teacher's cache by the training process itself, which is what the advice would change;
    an output folder that is not empty is how runs go on.
    """
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # bars, as everywhere
            for notice in (
                "Checkpoint directory", "Experiment logs directory", ".*does not have many workers", ".*treespec",
            ):  # fmt: skip
                warnings.filterwarnings("ignore", message=notice)
            yield
    finally:
        logger.setLevel(before)


def _csv(folder: Path, _: int) -> Any:
    return ContinuedCSV(folder)


def _tensorboard(folder: Path, step: int) -> Any:
    _needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    # What an earlier process wrote from this step on is made again; the same run then shows it once.
    return TensorBoardLogger(folder, name="log", version="", purge_step=step)


def _wandb(folder: Path, step: int) -> Any:
    _needs("wandb")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(save_dir=folder, project="lit_reduce", id=run_id(folder, step), resume="allow")


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"the logger {package} is not installed: pip install 'lit-reduce[loggers]'")


LOGGERS: dict[str, Callable[[Path, int], Any]] = {"csv": _csv, "tensorboard": _tensorboard, "wandb": _wandb}
"""Each is made from the output folder and the step from which training goes on."""
