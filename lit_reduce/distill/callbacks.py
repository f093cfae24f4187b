"""Callbacks of training: the moving average of the weights."""

from typing import Any

import torch
from lightning import Callback, Trainer
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
        """Takes the new weights in; early steps weigh more, so that the start is forgotten."""
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
