"""Callbacks of training: the moving average of the weights, and the progress bar."""

from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor


class MovingAverage(Callback):
    """Keeps an exponential moving average of the reducer's weights; validation and export see the average.

    Saved in the checkpoint, so a resumed run continues it exactly.
    """

    def __init__(self, decay: float) -> None:
        """Prepare the average; ``decay`` 0 turns it off."""
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates the average; the decay is lower in the first steps, so that initial weights have little effect."""
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        with torch.no_grad():
            for name, x in pl_module.reducer.state_dict().items():
                old = self.average.get(name)
                if old is None or not x.is_floating_point():  # counters and indices have no mean
                    self.average[name] = x.detach().clone()
                else:
                    self.average[name] = old.to(x.device).lerp_(x, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the average in place."""
        if self.decay and self.average and not self.present:
            self.present = {name: x.detach().clone() for name, x in pl_module.reducer.state_dict().items()}
            pl_module.reducer.load_state_dict(self.average)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the present weights back."""
        if self.present:
            pl_module.reducer.load_state_dict(self.present)
            self.present = {}

    def state_dict(self) -> dict[str, Any]:
        """The average, for the checkpoint."""
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The average of the run that is resumed."""
        self.average = dict(state_dict["average"])


class StepBar(TQDMProgressBar):
    """One bar for all steps of a run, earlier processes included: its data have no epochs."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the bar at the step of the resumed run."""
        super().on_train_start(trainer)
        bar = self.train_progress_bar
        bar.set_description_str("train", refresh=False)
        bar.total, bar.initial = trainer.max_steps, trainer.global_step
        self._show(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Does nothing: training has a single epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the step and the loss."""
        if self._should_update(trainer.global_step, trainer.max_steps):
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self._show(trainer)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> Any:
        """Without the logger's version, which says nothing here."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _show(self, trainer: Trainer) -> None:
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()
