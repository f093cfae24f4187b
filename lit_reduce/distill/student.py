"""The student: the same backbone on the reduced stream, with gradients through its frozen layers into the reducer."""

from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.batch import Batch
from lit_reduce.ops.gates import exact_budget, key_bias
from lit_reduce.reducer import Reducer, ScoringReducer
from lit_reduce.runtime.call import call
from lit_reduce.runtime.compact import compact
from lit_reduce.runtime.decoder import run_decoder
from lit_reduce.runtime.encode import IGNORE
from lit_reduce.runtime.inside import Inside
from lit_reduce.runtime.prompt import staged
from lit_reduce.tokens import Budget, Reduction, VisualTokens

FLOOR = 1e-6  # weight that a dropped key keeps in the backward pass, so that it can earn its way back


def score(model: Any, reducer: ScoringReducer, batch: Batch) -> Tensor:
    """The reducer's scores ``[B, N]`` of a batch, with gradient."""
    encoded = batch.encoded(model)
    return reducer.score(encoded.tokens(list(range(len(batch.ids))), reducer.signals))


def reduce(model: Any, reducer: Reducer, batch: Batch, keep: int) -> Reduction:
    """The reduction of every picture of a batch, with gradient."""
    return call(reducer, batch.encoded(model).tokens(list(range(len(batch.ids))), reducer.signals), keep)


def hard_logits(model: Any, reducer: Reducer, batch: Batch, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of the reduced stream as inference sees it, wherever the reducer acts.

    Returns:
        Logits ``[A, V]`` and labels ``[A]`` of the answer tokens, and the row ``[A]`` of each.
    """
    encoded = batch.encoded(model)
    if reducer.site == "projector":
        return _answers(model, compact(model, batch.inputs, encoded, reducer, keep)[0], None)
    short, logical = compact(model, batch.inputs, encoded, reducer, 1.0)
    inside = Inside(model, decoder=reducer)
    try:
        with inside.reading(staged(model, short, logical, encoded, {"decoder": (reducer, Budget(keep))})):
            return _answers(model, short, None)
    finally:
        inside.remove()


def soft_logits(
    model: Any, batch: Batch, scores: Tensor, keep: int, tau: float, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of the best ``keep`` tokens, with a gradient into all scores through an exact-budget gate.

    The forward pass is hard: it gives the logits of the gathered stream. The backward pass is that of a gate on every
    visual key (CoViPAL stage 2). Only the ``candidates`` best tokens enter the decoder; the gates of the others are too
    small to matter, and the sequence is a fraction of the whole.

    Args:
        model: The frozen backbone.
        batch: Questions.
        scores: ``[B, N]`` of the reducer.
        keep: K.
        tau: Softness of the gate, in units of the scores' spread.
        candidates: At least ``keep``; N for the full gradient.

    Returns:
        As `hard_logits`.
    """
    count = scores.shape[1]
    spread = scores.detach().float().std(-1, keepdim=True).clamp_min(1e-3)
    gates = exact_budget(scores.float() / spread, keep, tau)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    hard = torch.zeros_like(gates, dtype=torch.bool).scatter(1, order[:, :keep], True)
    inside = order[:, : min(max(candidates, keep), count)].sort(-1).values
    bias = key_bias(gates.gather(1, inside), hard.gather(1, inside), floor=FLOOR)
    short, _ = compact(model, batch.inputs, batch.encoded(model), _Chosen(inside), inside.shape[1])
    return _answers(model, short, bias)


class _Chosen(Reducer):
    """Keeps what was chosen beforehand."""

    name = "chosen"

    def __init__(self, anchors: Tensor) -> None:
        super().__init__()
        self.anchors = anchors

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Returns the anchors as they are."""
        return Reduction(self.anchors)


def _answers(model: Any, short: dict[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    labels = short.pop("labels")
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORE
    logits = run_decoder(model, short, key_bias=bias, at=asked)
    return logits, labels[:, 1:][asked[:, :-1]], asked.nonzero()[:, 0]
