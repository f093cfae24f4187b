"""What one batch teaches a reducer, by what the reducer says that it can be guided in (`Reducer.warmup_target`)."""

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
    """The teacher's answers alone, through the new tokens; the reducer is called as inference calls it.

    Attributes:
        lasts: Whether the guidance of stage 1 goes on beside the answers, with a weight that falls.
    """

    lasts = False

    def __init__(self, model: Any, reducer: Any, batch: Batch, keep: int, settings: TrainSettings) -> None:
        self.model, self.reducer, self.batch, self.settings = model, reducer, batch, settings
        self.keep = min(keep, batch.features.shape[1] - 1)  # all tokens, untouched, teach nothing
        self.calls: list[Call] = []

    def guidance(self) -> dict[str, Tensor]:
        """The loss against the teacher's attention under ``loss``, with its parts; empty for no stage 1."""
        return {}

    def answers(self) -> Answers:
        """The student's answers, with a gradient into the reducer."""
        done = (self.batch.step - self.settings.guide_steps) / max(1, self.settings.steps - self.settings.guide_steps)
        with listening(self.reducer) as self.calls:
            return student_logits(self.model, self.reducer, self.batch, self.keep, min(1.0, max(0.0, done)))

    def penalty(self) -> dict[str, Tensor]:
        """Further losses beside the answers, each with its weight in it; asked for after the answers."""
        said: dict[str, list[Tensor]] = {}
        for _, _, reduction in self.calls:
            for name, rows in reduction.losses.items():
                said.setdefault(name, []).append(rows)
        count = len(self.batch.ids)
        return {name: self.reducer.own_loss(name, torch.cat(rows), count) for name, rows in said.items()}


@contextmanager
def listening(reducer: Any) -> Iterator[list[Call]]:
    """Every call of a reducer while it lasts, at whatever layer: tokens, budget and reduction, gradients and all."""
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
    """New tokens: a warm-up, in which each becomes what the teacher's attention reads of its region; then answers."""

    def guidance(self) -> dict[str, Tensor]:
        """How far the new tokens lie from what is read."""
        reduction = reduce(self.model, self.reducer, self.batch, self.keep)
        if reduction.features is None or reduction.assignment is None:
            raise ValueError(
                f"{self.reducer.name} says warmup_target='tokens', so it must return features and assignment"
            )
        loss = reading(reduction.features, self.batch.features, reduction.assignment, self.batch.guide)
        return {"loss": loss, "reading": loss}


class ScoreObjective(Objective):
    """Scores (CoViPAL): they follow the teacher's attention, then its answers too, through a gate."""

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
        """Of the gated tokens, and of what stands for the rest."""
        summary_count = self.reducer.summary_count(self.keep)
        self.chosen = self.keep - summary_count
        candidates = min(math.ceil(self.settings.candidates * self.chosen), self.scores.shape[1] - summary_count)
        gated = GATES[self.settings.gate](self.batch, self.scores, self.chosen, candidates, self.settings)
        self.gated = with_rest(gated, self.reducer, self.tokens, self.scores, self.keep)
        return relaxed_logits(self.model, self.batch, self.gated)

    def penalty(self) -> dict[str, Tensor]:
        """Random gates should not stray from the budget; the others cannot."""
        if self.settings.gate != "concrete":
            return {}
        return {"budget": self.settings.loss.budget * budget_gap(self.gated.gates, self.chosen)}


class LayerObjective(Objective):
    """Scores at every layer (p-MoD): they follow the teacher's attention on what the reduced stream holds there.

    One pass serves both: the answers, with a gradient through what the reducer returns, and the guidance, whose
    gradient ends at the layer's states. That routers are guided is our reading; in p-MoD answers alone train them.
    """

    lasts = True

    def __init__(self, model: Any, reducer: Any, batch: Batch, keep: int, settings: TrainSettings) -> None:
        super().__init__(model, reducer, batch, keep, settings)
        with listening(reducer) as self.calls:
            self.said = student_logits(model, reducer, batch, self.keep)

    def guidance(self) -> dict[str, Tensor]:
        """The ranking loss, mean over the layers where the reducer chose."""
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
        """Of the pass that was made."""
        return self.said


OBJECTIVES = {
    "": Objective,
    "tokens": TokenObjective,
    "scores": ScoreObjective,
    "layers": LayerObjective,
    "keys": Objective,
}
