"""Training objectives: which losses a batch gives, chosen by `Reducer.warmup_target`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.batch import Batch
from lit_reduce.distill.losses import hinge, listwise, reading
from lit_reduce.distill.relaxation import GATES, with_rest
from lit_reduce.distill.student import reduce, relaxed_logits, sees, student_logits
from lit_reduce.ops.gates import budget_gap
from lit_reduce.settings.train import TrainSettings
from lit_reduce.tokens import Reduction, VisualTokens

Answers = tuple[Tensor, Tensor, Tensor]  # logits, labels and rows, see `student_logits`
Call = tuple[VisualTokens, int, Reduction]


class Objective:
    """Distillation of the teacher's answers only; the reducer is called as in inference.

    Attributes:
        lasts: Whether the loss of stage 1 continues in stage 2, with a weight that decreases.
    """

    lasts = False

    def __init__(self, model: Any, reducer: Any, batch: Batch, keep: int, settings: TrainSettings) -> None:
        self.model, self.reducer, self.batch, self.settings = model, reducer, batch, settings
        self.keep = min(keep, batch.features.shape[1] - 1)  # all tokens, untouched, teach nothing
        self.calls: list[Call] = []

    def guidance(self) -> dict[str, Tensor]:
        """The loss of stage 1 under ``loss``, and its parts for the log; empty where there is no stage 1."""
        return {}

    def answers(self) -> Answers:
        """The student's logits at the answer tokens, with gradients to the reducer."""
        done = (self.batch.step - self.settings.guide_steps) / max(1, self.settings.steps - self.settings.guide_steps)
        with listening(self.reducer) as self.calls:
            return student_logits(self.model, self.reducer, self.batch, self.keep, min(1.0, max(0.0, done)))

    def penalty(self) -> dict[str, Tensor]:
        """Further losses of stage 2, already weighted; called after `answers`."""
        said: dict[str, list[Tensor]] = {}
        for _, _, reduction in self.calls:
            for name, rows in reduction.losses.items():
                said.setdefault(name, []).append(rows)
        count = len(self.batch.ids)
        return {name: self.reducer.own_loss(name, torch.cat(rows), count) for name, rows in said.items()}


@contextmanager
def listening(reducer: Any) -> Iterator[list[Call]]:
    """Records every call of a reducer inside the block: tokens, budget and reduction, with their gradients."""
    calls: list[Call] = []

    def hear(_: Any, given: Any, made: Any) -> None:
        if isinstance(made, Reduction):  # not where a layer looks back at one
            calls.append((*given, made))

    listener = reducer.register_forward_hook(hear)
    try:
        yield calls
    finally:
        listener.remove()


class TokenObjective(Objective):
    """Stage 1: each new token matches what the teacher's attention reads from its region. Stage 2: answers."""

    def guidance(self) -> dict[str, Tensor]:
        """The distance between the new tokens and their targets, see `losses.reading`."""
        reduction = reduce(self.model, self.reducer, self.batch, self.keep)
        if reduction.features is None or reduction.assignment is None:
            raise ValueError(
                f"{self.reducer.name} says warmup_target='tokens', so it must return features and assignment"
            )
        loss = reading(reduction.features, self.batch.features, reduction.assignment, self.batch.guide)
        return {"loss": loss, "reading": loss}


class ScoreObjective(Objective):
    """Scores (CoViPAL). Stage 1: they match the teacher's attention. Stage 2: also its answers, through a gate."""

    lasts = True

    def __init__(self, model: Any, reducer: Any, batch: Batch, keep: int, settings: TrainSettings) -> None:
        super().__init__(model, reducer, batch, keep, settings)
        self.keep, self.tokens = keep, sees(model, reducer, batch)
        self.scores: Tensor = reducer.score(self.tokens)

    def guidance(self) -> dict[str, Tensor]:
        """The ranking loss."""
        found = {
            "rank": listwise(self.scores, self.batch.guide),
            "hinge": hinge(self.scores, self.batch.guide, self.keep),
        }
        return {"loss": found["rank"] + self.settings.loss.hinge * found["hinge"], **found}

    def answers(self) -> Answers:
        """The logits on the gated tokens and the summary tokens."""
        summary_count = self.reducer.summary_count(self.keep)
        self.chosen = self.keep - summary_count
        candidates = min(math.ceil(self.settings.candidates * self.chosen), self.scores.shape[1] - summary_count)
        gated = GATES[self.settings.gate](self.batch, self.scores, self.chosen, candidates, self.settings)
        self.gated = with_rest(gated, self.reducer, self.tokens, self.scores, self.keep)
        return relaxed_logits(self.model, self.batch, self.gated)

    def penalty(self) -> dict[str, Tensor]:
        """The budget loss of random gates; the other gates meet the budget exactly."""
        if self.settings.gate != "concrete":
            return {}
        return {"budget": self.settings.loss.budget * budget_gap(self.gated.gates, self.chosen)}


class LayerObjective(Objective):
    """Scores at every layer (p-MoD) that match the teacher's attention on the hidden states of the reduced sequence.

    One forward pass gives both losses: answers, with gradients through the reducer's output, and the attention loss,
    whose gradient stops at the layer's hidden states. The attention loss is our addition; p-MoD trains on answers only.
    """

    lasts = True

    def __init__(self, model: Any, reducer: Any, batch: Batch, keep: int, settings: TrainSettings) -> None:
        super().__init__(model, reducer, batch, keep, settings)
        with listening(reducer) as self.calls:
            self.said = student_logits(model, reducer, batch, self.keep)

    def guidance(self) -> dict[str, Tensor]:
        """The ranking loss, averaged over the layers at which the reducer acts."""
        guide, found = self.batch.guide, dict[str, list[Tensor]](rank=[], hinge=[])
        for tokens, keep, _ in self.calls:
            scores = self.reducer.score(replace(tokens, features=tokens.features.detach()))
            if scores.shape != guide.shape:
                raise ValueError(
                    f"{self.reducer.name} says warmup_target='layers', so it must see all tokens at each layer"
                )
            found["rank"].append(listwise(scores, guide))
            found["hinge"].append(hinge(scores, guide, keep))
        means = {name: torch.stack(losses).mean() for name, losses in found.items()}
        return {"loss": means["rank"] + self.settings.loss.hinge * means["hinge"], **means}

    def answers(self) -> Answers:
        """The logits of the pass that `__init__` made."""
        return self.said


OBJECTIVES = {
    "": Objective,
    "tokens": TokenObjective,
    "scores": ScoreObjective,
    "layers": LayerObjective,
    "keys": Objective,
}
