"""Runs the vision tower on the pictures of a batch, with gradients to a reducer that acts inside it."""

from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.batch import Batch
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.encode import Encoded, trace
from lit_reduce.runtime.session import Session
from lit_reduce.runtime.vision.base import installed
from lit_reduce.tokens import Budget


def through_tower(model: Any, reducer: Reducer, batch: Batch, keep: int) -> tuple[Encoded, list[Tensor]]:
    """What leaves tower and projector when the reducer is in the tower, each picture once, whatever is asked about it.

    Args:
        model: The frozen backbone.
        reducer: Of site ``encoder``.
        batch: With its pictures' pixels.
        keep: Tower tokens of each image or tile.

    Returns:
        Entries for each question; and the register that each visual token of its picture went into ``[N]``, where the
        reducer makes registers.
    """
    with Session(model, {reducer.site: (reducer, Budget(keep))}).install():
        encoded = encoded_again(model, reducer, batch)
        hooks = installed(model)
    owners = [] if hooks is None else hooks.owners
    return encoded, [owners[picture] for picture in batch.picture.tolist()] if owners else []


def encoded_again(model: Any, reducer: Reducer, batch: Batch) -> Encoded:
    """The pictures of a batch through a tower with a reducer in it, each once, with an entry for each question."""
    if not batch.pixels:
        raise ValueError(f"'{reducer.name}' acts inside the tower, but the teacher was not asked for pixels")
    rows = batch.firsts
    pixels = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in batch.pixels.items()}
    found = trace(model, {"input_ids": batch.ids[rows], "attention_mask": batch.mask[rows], **pixels})
    return found.each(batch.picture.tolist())


def registers(model: Any, reducer: Reducer, batch: Batch, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors ``[B, K]``, projected registers ``[B, K, D]``, and the register of each visual token ``[B, N]``."""
    encoded, owners = through_tower(model, reducer, batch, keep)
    return torch.stack(encoded.kept_indices), torch.stack(encoded.features), torch.stack(owners)
