"""Stages 3 and 5: the tower moves on to whole pictures; then tower, projector and decoder learn to answer together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from lit_reduce_pocket.easy import easy_picture
from lit_reduce_pocket.guidance import guided_answers, sights_of
from lit_reduce_pocket.labels import patch_labels
from lit_reduce_pocket.loop import Losses
from lit_reduce_pocket.model import normalise, patches_of, tower_forward
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import owners, render
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.tower import PLACE, Heads, cls_labels, dense_loss, picture_hidden, place_loss
from lit_reduce_pocket.turns import pack
from lit_reduce_pocket.world import GRID, make_scene, scene_rng

TURNS, TEXT = 20, 288
START = 4.0  # see `guided_answers`
SHOWN = 208  # visual tokens a picture while only a part is shown to the decoder


def question_batch(step: int, scenes: int, easy: int = 0, shown: int | None = SHOWN) -> dict[str, Tensor]:
    """Makes pictures with dense labels and packed turns.

    Args:
        step: Of the loop.
        scenes: Rendered scenes in the batch.
        easy: Pictures of easy-VQA in the batch; their dense labels are all 0.
        shown: How many of the 576 patches the decoder sees (those of things first), or None for all.
    """
    out: dict[str, list[np.ndarray]] = {}
    for i in range(scenes + easy):
        index = step * scenes + i
        if i < scenes:
            scene = make_scene("train", index)
            picture, labels, whole = np.asarray(render(scene)), patch_labels(scene), cls_labels(scene)
            things, asked = scene.things, questions(scene, TURNS)
            turns, owner = [(q.prompt, q.answer) for q in asked], np.stack(owners(scene)).reshape(3, -1)
        else:
            picture, turns, labels, whole = easy_picture(step * easy + i - scenes, TURNS)
            things, asked, owner = (), [], np.full((3, GRID * GRID), -1)
        rng = scene_rng("train", index, 4)
        chance = rng.random(GRID * GRID) + (labels["kind"] > 0) * rng.uniform(0, 1)
        where = np.arange(GRID * GRID) if shown is None else np.sort(np.argsort(-chance)[:shown])
        packed = pack(turns, TEXT)
        sights = sights_of(things, asked, packed, owner[:, where])
        row = {**packed, **sights, **labels, "pictures": picture, "where": where, "whole": whole}
        for key, value in row.items():
            out.setdefault(key, []).append(value)
    return {k: torch.from_numpy(np.stack(v)) for k, v in out.items()}


def seeing_loss(model: LlavaForConditionalGeneration, heads: Heads, batch: dict[str, Tensor]) -> tuple[Tensor, Losses]:
    """Asks the tower what every patch of whole pictures shows and where it is, and CLS what is there.

    Returns:
        Its last layer [B, 577, D] and the losses.
    """
    hidden = picture_hidden(model, batch["pictures"])
    logits, whole = heads(hidden)
    losses = dense_loss(logits, batch)
    every = torch.arange(GRID * GRID, device=hidden.device).expand(len(hidden), -1)
    losses["place"] = PLACE * place_loss(heads, hidden, every)
    losses["whole"] = F.binary_cross_entropy_with_logits(whole.float(), batch["whole"]) * 20
    losses["loss"] = losses["loss"] + losses["place"] + losses["whole"]
    return hidden, losses


def saying_loss(
    model: LlavaForConditionalGeneration, symbols: Symbols, hidden: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Asks the projector to say what the tower sees in the decoder's words.

    Returns:
        The projected tokens [B, 576, E], and the share of the words that they do not say, a scalar.
    """
    projected = model.model.multi_modal_projector(hidden[:, 1:])
    with torch.no_grad():
        every = torch.arange(GRID * GRID, device=projected.device).expand(len(projected), -1)
        target = symbols(model.get_input_embeddings(), batch, every).float()
        scale = target.var()
    gap = (projected.float() - target).square().mean(-1) / scale
    some = (batch["kind"] > 0) | (batch["word"] > 0)
    words = (gap * some).sum() / some.sum().clamp(min=1) + (gap * ~some).sum() / (~some).sum().clamp(min=1)
    return projected, words


def picture_loss(
    model: LlavaForConditionalGeneration, heads: Heads, device: torch.device
) -> Callable[[Any, int], Losses]:
    """Returns the loss of whole pictures without questions."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        return seeing_loss(model, heads, {k: v.to(device) for k, v in batch.items()})[1]

    return loss_of


def connect_loss(
    model: LlavaForConditionalGeneration, heads: Heads, symbols: Symbols, device: torch.device, easy: int,
    counted: float = 1.0,
) -> Callable[[Any, int], Losses]:  # fmt: skip
    """Returns the loss of pictures with questions; the dense losses stay on as an anchor. `counted`: see guidance."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        batch = {k: v.to(device) for k, v in batch.items()}
        ours = len(batch["pictures"]) - easy
        scenes = {k: v[:ours] for k, v in batch.items()}
        hidden, seen = seeing_loss(model, heads, scenes)
        projected, seen["words"] = saying_loss(model, symbols, hidden, scenes)
        where = batch["where"]
        visual = projected.gather(1, where[:ours, :, None].expand(-1, -1, projected.shape[-1]))
        if easy:  # their tower sees the shown patches alone: one large shape does not need the others
            patches = patches_of(normalise(batch["pictures"][ours:]))
            patches = patches.gather(1, where[ours:, :, None].expand(-1, -1, patches.shape[-1]))
            hidden = tower_forward(model, patches, where[ours:])
            visual = torch.cat([visual, model.model.multi_modal_projector(hidden[:, 1:])])
        valid = torch.ones_like(where, dtype=torch.bool)
        said = guided_answers(model, symbols, visual, where, valid, batch, start=START, counted=counted)
        return {**seen, **said, "loss": said["loss"] + 0.25 * (seen["loss"] + seen["words"])}

    return loss_of
