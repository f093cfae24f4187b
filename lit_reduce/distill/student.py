"""The student: the same backbone on the reduced stream, with gradients through its frozen layers into the reducer."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.batch import Batch
from lit_reduce.distill.relaxation import RelaxedSelection
from lit_reduce.distill.tower_pass import registers, through_tower
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call
from lit_reduce.runtime.compact import compact
from lit_reduce.runtime.decoder.compressed_kv import CompressedKV, digest, retold
from lit_reduce.runtime.decoder.hooks import DecoderHooks
from lit_reduce.runtime.decoder.run import run_decoder
from lit_reduce.runtime.decoder.schedule import schedule_prompt
from lit_reduce.runtime.encode import IGNORE, Encoded
from lit_reduce.runtime.recall.hooks import ImageMemory, looking_back
from lit_reduce.tokens import Budget, Reduction, VisualTokens


def sees(model: Any, reducer: Reducer, batch: Batch) -> VisualTokens:
    """What a reducer before the language model sees of every question's picture."""
    return batch.encoded(model).tokens(list(range(len(batch.ids))), reducer.signals)


def reduce(model: Any, reducer: Reducer, batch: Batch, keep: int) -> Reduction:
    """The reduction of every picture of a batch, with gradient; of registers, what became of them in the end."""
    if reducer.kind == "register" and reducer.site == "encoder":
        kept_indices, features, owner = registers(model, reducer, batch, keep)
        return Reduction(kept_indices, features=features, assignment=owner)
    return call(reducer, sees(model, reducer, batch), keep)


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
    if reducer.site == "encoder":
        encoded = through_tower(model, reducer, batch, keep)[0]
        return _answers(model, compact(model, batch.inputs, encoded, reducer, 1.0)[0], None)
    encoded = batch.encoded(model)
    if reducer.site == "projector":
        short, logical = compact(model, batch.inputs, encoded, reducer, keep)
        with looking_back(model, reducer, ImageMemory.of(model, reducer, batch.inputs, short, logical)):
            return _answers(model, short, None)
    if reducer.kind == "register":
        told = _told(model, reducer, batch, encoded, keep)
        short = compact(model, batch.inputs, encoded, reducer, keep)[0]
        with retold(model, told, short):
            return _answers(model, short, None)
    short, logical = compact(model, batch.inputs, encoded, reducer, 1.0)
    inside = DecoderHooks(model, decoder=reducer)
    inside.progress = progress
    try:
        with inside.reading(schedule_prompt(model, short, logical, encoded, {"decoder": (reducer, Budget(keep))})):
            return _answers(model, short, None)
    finally:
        inside.remove()


def _told(model: Any, reducer: Reducer, batch: Batch, encoded: Encoded, keep: int) -> CompressedKV:
    """What learned tokens read of each picture, once for all questions about it."""
    rows = batch.firsts
    inputs = {name: x[rows] for name, x in batch.inputs.items()}
    return digest(model, reducer, inputs, encoded.each(rows), keep).of(batch.picture.tolist())


def relaxed_logits(model: Any, batch: Batch, gated: RelaxedSelection) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of the tokens that enter under gates, with a gradient into the scores that made them.

    Returns:
        As `student_logits`.
    """
    encoded = batch.encoded(model)
    if gated.features is not None:
        encoded = replace(encoded, features=list(gated.features.to(encoded.features[0].dtype)))
    short, _ = compact(model, batch.inputs, encoded, _Chosen(gated.kept_indices), gated.kept_indices.shape[1])
    return _answers(model, short, gated.bias)


class _Chosen(Reducer):
    """Keeps what was chosen beforehand."""

    name = "chosen"

    def __init__(self, kept_indices: Tensor) -> None:
        super().__init__()
        self.kept_indices = kept_indices

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Returns the anchors as they are."""
        return Reduction(self.kept_indices)


def _answers(model: Any, short: dict[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    labels = short.pop("labels")
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORE
    logits = run_decoder(model, short, key_bias=bias, at=asked)
    return logits, labels[:, 1:][asked[:, :-1]], asked.nonzero()[:, 0]
