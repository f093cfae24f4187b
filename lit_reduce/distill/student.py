"""The student: the same backbone on the reduced stream, with gradients through its frozen layers into the reducer."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import family_of
from lit_reduce.distill.batch import Batch
from lit_reduce.distill.relaxation import RelaxedSelection
from lit_reduce.distill.tower_pass import encoded_again, registers
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call_reducer, matched
from lit_reduce.runtime.compact import selected_images, shorten
from lit_reduce.runtime.decoder.run import run_decoder
from lit_reduce.runtime.encode import IGNORE
from lit_reduce.runtime.handlers import shares_encoding
from lit_reduce.runtime.session import Session
from lit_reduce.tokens import Budget, Reduction, VisualTokens


def sees(model: Any, reducer: Reducer, batch: Batch) -> VisualTokens:
    """What a reducer before the language model sees of every question's picture, in the reducer's own precision."""
    return matched(reducer, batch.encoded(model).tokens(list(range(len(batch.ids))), reducer.signals))


def reduce(model: Any, reducer: Reducer, batch: Batch, keep: int) -> Reduction:
    """The reduction of every picture of a batch, with gradient; of registers, what became of them in the end."""
    if not shares_encoding(reducer):
        kept_indices, features, owner = registers(model, reducer, batch, keep)
        return Reduction(kept_indices, features=features, assignment=owner)
    return call_reducer(reducer, sees(model, reducer, batch), keep)


def student_logits(
    model: Any, reducer: Reducer, batch: Batch, keep: int, progress: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of the reduced stream as inference sees it, wherever the reducer acts.

    Args:
        model: The frozen backbone.
        reducer: Acts at its own site.
        batch: Questions.
        keep: K.
        progress: Of training; a reducer between decoder layers may then gate tokens where inference drops them.

    Returns:
        Logits ``[A, V]`` and labels ``[A]`` of the answer tokens, and the row ``[A]`` of each.
    """
    # Where counts differ between pictures, a session accepts what it can check for all of them: a ratio.
    known = family_of(model.config).tokens(model.config)
    budget = Budget(keep if known else min(1.0, keep / batch.features.shape[1]))
    with Session(model, {reducer.site: (reducer, budget)}, progress=progress).install() as session:
        encoded = batch.encoded(model) if session.shares_encoding else encoded_again(model, reducer, batch)
        short, _ = session.shorten(batch.inputs, encoded)
        with session.reading():
            return _answers(model, short, None)


def relaxed_logits(model: Any, batch: Batch, gated: RelaxedSelection) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of the tokens that enter under gates, with a gradient into the scores that made them.

    Returns:
        As `student_logits`.
    """
    encoded = batch.encoded(model)
    if gated.features is not None:
        encoded = replace(encoded, features=list(gated.features.to(encoded.features[0].dtype)))
    short, _ = shorten(model, batch.inputs, encoded, selected_images(encoded, list(gated.kept_indices)))
    return _answers(model, short, gated.bias)


def _answers(model: Any, short: dict[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    labels = short.pop("labels")
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORE
    logits = run_decoder(model, short, key_bias=bias, at=asked)
    return logits, labels[:, 1:][asked[:, :-1]], asked.nonzero()[:, 0]
