"""The Distiller: trains any reducer against the frozen backbone that it will be plugged into."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from lit_reduce.distill.batch import Batch
from lit_reduce.distill.losses import answer_kl, row_mean
from lit_reduce.distill.objectives import OBJECTIVES
from lit_reduce.distill.seeded_sampling import budget_of, tokens_of
from lit_reduce.distill.student import student_logits
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.checkpointing import recomputed
from lit_reduce.settings.train import TrainSettings


def measure_name(budget: float) -> str:
    """A validation budget in the name of a measure: a count as it is, a ratio in percent."""
    return str(budget) if isinstance(budget, int) else f"{budget:.4%}".replace(".", "_").rstrip("0%").rstrip("_") + "%"


class Distiller(LightningModule):
    """Trains a reducer in two stages: against the teacher's attention, then against its answers; see `objectives`.

    The backbone is held outside the module tree, so checkpoints hold only the reducer and the optimiser sees nothing
    else. A reducer without a ``warmup_target`` skips stage 1.
    """

    def __init__(self, model: Any, reducer: Reducer, settings: TrainSettings) -> None:
        """Prepare a distiller.

        Args:
            model: The frozen backbone; held outside the module tree.
            reducer: What is trained.
            settings: Losses, budgets, stages and the optimiser's numbers.
        """
        super().__init__()
        self.reducer = reducer
        self.held = (model,)
        self.settings = settings
        names = ("accuracy", "agreement", "kl", "kept")
        made = {f"{name}_{measure_name(k)}": MeanMetric() for name in names for k in settings.val_budgets}
        self.measures: Any = torch.nn.ModuleDict(made)

    def step_losses(self, batches: list[Batch]) -> dict[str, Tensor]:
        """The `losses` of a step: means over its batches, each as heavy as it has questions."""
        total, found = sum(len(batch.ids) for batch in batches), dict[str, Tensor]()
        for batch in batches:
            for name, value in self.losses(batch).items():
                share = value if len(batches) == 1 else value * (len(batch.ids) / total)
                found[name] = found[name] + share if name in found else share
        return found

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """All losses of a batch; ``loss`` is their weighted sum, the rest is for the log."""
        s, weights = self.settings, self.settings.loss
        total, way = batch.features.shape[1], s.curriculum * s.steps
        done = (batch.step + 1) / way if way else 1.0
        keep = min(budget_of(batch.step, s.seed, s.budgets, s.budget_weights, done, total), total)
        objective = OBJECTIVES[self.reducer.warmup_target](self.held[0], self.reducer, batch, keep, s)
        first = batch.step < s.guide_steps
        out = objective.guidance() if first or objective.lasts else {}
        if first and out:
            return out
        with recomputed(self.held[0]) if s.checkpointing else nullcontext():
            logits, labels, rows = objective.answers()
        warmup_loss, count = out.pop("loss", torch.zeros(())), len(batch.ids)
        out["kl"] = row_mean(answer_kl(logits, batch.top, batch.top_ids, weights.temperature), rows, count)
        out["ce"] = row_mean(F.cross_entropy(logits.float(), labels, reduction="none"), rows, count)
        progress = (batch.step - s.guide_steps) / max(1, s.steps - s.guide_steps)
        share = weights.rank_first + (weights.rank_last - weights.rank_first) * min(1.0, max(0.0, progress))
        further = objective.penalty()
        loss = weights.kl * out["kl"] + weights.ce * out["ce"] + share * warmup_loss + sum(further.values())
        return {"loss": loss, **out, **further}

    def training_step(self, batch: list[Batch], batch_idx: int) -> Tensor:
        """One step; logs every loss."""
        losses, count = self.step_losses(batch), sum(len(part.ids) for part in batch)
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=count)
        return losses["loss"]

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Measures the answers on the reduced sequence, as in inference, at every validation budget.

        An answer counts as right when every token of it is the most likely one: what greedy decoding would give.
        """
        for part in batch:
            self._measure(part)

    def _measure(self, batch: Batch) -> None:
        count, total = len(batch.ids), batch.features.shape[1]
        for budget in self.settings.val_budgets:
            name = measure_name(budget)
            keep = tokens_of(budget, total)
            logits, labels, rows = student_logits(self.held[0], self.reducer, batch, keep)
            best = logits.argmax(-1)
            kl = answer_kl(logits, batch.top, batch.top_ids)
            for kind, miss in (("accuracy", best != labels), ("agreement", best != batch.top_ids[:, 0])):
                wrong = torch.zeros(count, device=rows.device).index_add(0, rows, miss.float())
                self.measures[f"{kind}_{name}"].update((wrong == 0).float())
            self.measures[f"kl_{name}"].update(kl)
            self.measures[f"kept_{name}"].update(float(keep), weight=count)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures, and their mean accuracy as ``val/accuracy``."""
        values = {name: metric.compute() for name, metric in self.measures.items()}
        for name, value in values.items():
            self.log(f"val/{name}", value)
            self.measures[name].reset()
        accuracy = torch.stack([values[f"accuracy_{measure_name(k)}"] for k in self.settings.val_budgets]).mean()
        self.log("val/accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW on the reducer, linear warm-up, cosine down to a hundredth."""
        s = self.settings
        trained = [weight for weight in self.reducer.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, weight_decay=s.weight_decay)

        def factor(step: int) -> float:
            if step < s.warmup:
                return (step + 1) / s.warmup
            share = (step - s.warmup) / max(1, s.steps - s.warmup)
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
