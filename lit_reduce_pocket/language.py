"""Stage 2: the decoder learns to ask and answer on symbolic scenes, where a patch is the sum of the words for it.

Answering does not need pixels: a scene is a few dozen patches of its things, each one embedding, at their places in the
576-token picture. The word embeddings serve on both sides, so that what is seen and what is said are the same vectors;
the projector later maps pixels to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from lit_reduce_pocket.guidance import guided_answers, sights_of
from lit_reduce_pocket.labels import patch_labels
from lit_reduce_pocket.loop import Losses
from lit_reduce_pocket.questions import FAMILIES, questions
from lit_reduce_pocket.render import owners
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.turns import pack
from lit_reduce_pocket.world import GRID, make_scene, scene_rng

TURNS = 16
SEEN = 64  # patches of a symbolic scene
TEXT = 224  # tokens of all its turns
ORDER = tuple(FAMILIES)


def symbolic_batch(
    step: int, scenes: int, families: int = len(ORDER), things: int = 99, seen: int = SEEN, turns: int = TURNS
) -> dict[str, Tensor]:
    """Makes symbolic scenes with packed turns.

    Args:
        step: Of the loop; scenes step * scenes … are used.
        scenes: In the batch.
        families: Only the first so many families of questions are asked.
        things: Scenes are cut to so many things.
        seen: Patches shown at most.
        turns: Questions a scene.
    """
    out: dict[str, list[np.ndarray]] = {}
    for i in range(scenes):
        index = step * scenes + i
        scene = make_scene("train", index)
        if len(scene.things) > things:
            scene = type(scene)(scene.seed, scene.background, 0, scene.things[-things:], None)
        rng = scene_rng("train", index, 3)
        labels = patch_labels(scene)
        must = labels["centre"] > 0
        some = (labels["kind"] > 0) & ~must
        chance = rng.random(GRID * GRID) + 2.0 * must + 1.0 * some * (rng.random(GRID * GRID) < 0.6)
        chance += 0.5 * ((labels["first"] > 0) | (labels["word"] > 0))
        n = int(min(seen, must.sum() + max(4, some.sum() * rng.uniform(0.3, 1.0)) + rng.integers(0, 8)))
        where = np.sort(np.argsort(-chance)[:n])
        valid = np.zeros(seen, bool)
        valid[:n] = True
        where = np.concatenate([where, np.zeros(seen - n, np.int64)])
        asked = [q for q in questions(scene, turns * (1 if families >= 8 else 3)) if q.family in ORDER[:families]]
        asked = asked[:turns]
        packed = pack([(q.prompt, q.answer) for q in asked], TEXT * turns // TURNS)
        owner = np.stack(owners(scene)).reshape(3, -1)[:, where]
        sights = sights_of(scene.things, asked, packed, np.where(valid, owner, -1))
        row = {**packed, **sights, "where": where, "valid": valid, **{f: v[where] for f, v in labels.items()}}
        for key, value in row.items():
            out.setdefault(key, []).append(value)
    return {k: torch.from_numpy(np.stack(v)) for k, v in out.items()}


def symbolic_loss(
    model: LlavaForConditionalGeneration, symbols: Symbols, device: torch.device
) -> Callable[[Any, int], Losses]:
    """Returns the loss of a symbolic batch."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        batch = {k: v.to(device) for k, v in batch.items()}
        visual = symbols(model.get_input_embeddings(), batch, batch["where"])
        return guided_answers(model, symbols, visual, batch["where"], batch["valid"], batch)

    return loss_of
