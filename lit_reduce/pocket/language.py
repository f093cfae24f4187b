"""Stage 2: the decoder learns to ask and answer on symbolic scenes, where a patch is the sum of the words for it.

Binding (which number is on the red circle) is the slow thing to learn, and it does not need pixels: a scene is a few
dozen patches of its things, each one embedding, at their places in the 576-token picture. The word embeddings serve on
both sides, so that what is seen and what is said are the same vectors; the projector later maps pixels to them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_reduce.pocket.labels import FIELDS, SIZES, patch_labels
from lit_reduce.pocket.loop import Losses
from lit_reduce.pocket.questions import FAMILIES, Question, questions
from lit_reduce.pocket.render import owners
from lit_reduce.pocket.turns import BOS, pack, turn_mask
from lit_reduce.pocket.words import vocabulary
from lit_reduce.pocket.world import GRID, Thing, make_scene, scene_rng

TURNS = 16
SEEN = 64  # patches of a symbolic scene
TEXT = 224  # tokens of all its turns
ORDER = tuple(FAMILIES)
NAMING, ANSWERING = 1, (2, 3)  # decoder layers whose first heads are shown where to look, for names and for answers


class Symbols(nn.Module):
    """Turns patch labels into embeddings: the words of what the patch shows, plus where it is."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.place = nn.Embedding(2 * GRID, width)  # rows, then columns
        self.extra = nn.Embedding(4, width)  # what has no word of its own: background, chart, centre; one spare
        nn.init.normal_(self.place.weight, std=0.03)
        nn.init.normal_(self.extra.weight, std=0.03)
        pieces = {p: i for i, p in enumerate(vocabulary())}
        for field, names in FIELDS.items():
            ids = [pieces.get(("##" if field == "second" else "") + n, -1) for n in names]
            self.register_buffer(f"ids_{field}", torch.tensor(ids), persistent=False)

    def forward(self, embedding: nn.Embedding, labels: dict[str, Tensor], where: Tensor) -> Tensor:
        """Embeds labels {field: [B, P]} of the patches at raster indices `where` [B, P] as [B, P, D]."""
        out: Tensor = self.place(where // GRID) + self.place(GRID + where % GRID)
        for field in FIELDS:
            ids = getattr(self, f"ids_{field}")[labels[field]]
            some = (labels[field] > 0) & (ids >= 0)
            out = out + embedding(ids.clamp(min=0)) * some[..., None]
        kind = labels["kind"]
        out = out + self.extra.weight[0] * (kind == 0)[..., None]
        out = out + self.extra.weight[1] * (kind == SIZES["kind"] - 1)[..., None]
        return out + self.extra.weight[2] * (labels["centre"] > 0)[..., None]


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


def sights_of(
    things: tuple[Thing, ...], asked: list[Question], packed: dict[str, np.ndarray], owner: np.ndarray
) -> dict[str, np.ndarray]:
    """Says what each text token should look at.

    Args:
        things: Of the scene.
        asked: The questions, in the order of the turns; none where nobody knows.
        packed: Of `pack`, [T] each.
        owner: [3, P], of `owners` at the patches shown.

    Returns:
        look [T, 1 + P]: the start token, then the patches that decide the answer. Where things are counted it is their
        centres and the start token, so that the weight left on the start token says how many there are.
        named [T, P]: for the last word of a name, the centre of the thing.
        compared [T, 2]: for the tokens of an answer about two things, where their names end in T; -1 for others.
    """
    turn, place = packed["turn"], packed["place"]
    look = np.zeros((turn.max() + 2, 1 + owner.shape[1]), bool)  # the last row, of padding (turn -1), stays empty
    named = np.zeros((len(turn), owner.shape[1]), bool)
    compared = np.full((len(turn), 2), -1)
    for j, question in enumerate(asked):
        about = [things.index(t) for t in question.about]
        counted = question.prompt.startswith("how many")
        look[j, 0] = counted or question.family == "presence"
        look[j, 1:] = np.isin(owner[2], about) | (np.isin(owner[1], about) & (owner[2] < 0) & (not counted))
        ends = []
        for at, thing in named_things(question):
            token = (turn == j) & (place == at)
            named[token] |= owner[2] == things.index(thing)
            ends += list(token.nonzero()[0])
        if question.family == "relation" and len(ends) == 2:
            compared[turn == j] = ends
    return {"look": look[turn], "named": named, "compared": compared}


def named_things(question: Question) -> list[tuple[int, Thing]]:
    """Returns the things that a prompt names as "red circle", each with the place of its last word."""
    words = question.prompt.split()
    pairs = list(enumerate(pairwise(words), 1))
    return [(at, t) for t in question.about for at, pair in pairs if pair == (t.color, t.shape)]


def answer_logits(
    model: LlavaForConditionalGeneration, visual: Tensor, where: Tensor, valid: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the decoder on visual embeddings and packed turns.

    Args:
        model: Pocket.
        visual: [B, P, D] embeddings of the patches at `where`.
        where: [B, P] raster indices; the token of patch i sits at position 1 + i.
        valid: [B, P] bool.
        batch: ids, targets, turn and place of `pack`, [B, T].

    Returns:
        The logits [M, vocabulary] and targets [M] at the answer positions.
    """
    embedding = model.get_input_embeddings()
    text = embedding(batch["ids"])
    start = embedding(torch.full((len(visual), 1), BOS, device=visual.device))
    place = torch.cat([torch.zeros_like(where[:, :1]), 1 + where], 1)
    seen = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
    mask = turn_mask(seen, place, batch["turn"], batch["place"], torch.float32)
    positions = torch.cat([place, 1 + GRID * GRID + batch["place"]], 1)
    hidden = model.get_decoder()(
        inputs_embeds=torch.cat([start, visual.to(text.dtype), text], 1), attention_mask=mask, position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, place.shape[1] :]  # fmt: skip
    asked = batch["targets"] >= 0
    return model.lm_head(hidden[asked]), batch["targets"][asked]


class Watched:
    """Log-probabilities of the guided heads from text token `first` on, by layer; None when nobody watches."""

    rows: dict[int, Tensor] | None = None
    first = 0


def watched_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """The fused attention, which also reports where the first three heads of the guided layers look."""
    if Watched.rows is not None and module.layer_idx in (NAMING, *ANSWERING) and mask is not None:
        logits = (q[:, :3, Watched.first :] * scaling) @ k[:, :3].transpose(-1, -2)
        Watched.rows[module.layer_idx] = (logits.float() + mask[:, :, Watched.first :]).log_softmax(-1)
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
    return out, None


AttentionInterface.register("pocket_watched", watched_attention)


def misses(logp: Tensor, goal: Tensor) -> Tensor:
    """KL from the even distribution over ``goal`` [B, T, P] to attention [B, T, P], mean over rows that have a goal."""
    some = goal.any(-1)
    even = (goal / goal.sum(-1, keepdim=True).clamp(min=1))[some]
    return (even * (even.clamp(min=1e-9).log() - logp[some])).sum(-1).sum() / some.sum().clamp(min=1)


def guided_answers(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    where: Tensor,
    valid: Tensor,
    batch: dict[str, Tensor],
    guidance: float = 0.5,
) -> Losses:
    """Asks packed turns and shows some heads where to look.

    Cross-entropy at the answers, and guidance. Where a thing is named, head 0 of one layer shall look at it. Where an
    answer is given, head 0 of two later layers shall look at the things that decide it, and heads 1 and 2 at the names
    of the two things that are compared. Without guidance the decoder guesses among the things in view for tens of
    thousands of questions before it learns to bind.

    Args:
        model: Pocket.
        visual: [B, P, D], as `where` and `valid` see `answer_logits`.
        where: [B, P].
        valid: [B, P].
        batch: Of `pack` and `sights_of`.
        guidance: Weight of the guidance.

    Returns:
        "loss", its parts, and "right", the share of right answer tokens.
    """
    config = model.config.text_config
    before, config._attn_implementation, Watched.rows = config._attn_implementation, "pocket_watched", {}
    Watched.first = p = where.shape[1] + 1
    try:
        logits, targets = answer_logits(model, visual, where, valid, batch)
        rows = Watched.rows
    finally:
        config._attn_implementation, Watched.rows = before, None
    answers = (batch["targets"] >= 0)[..., None]
    text = torch.arange(batch["ids"].shape[1], device=where.device)
    ends = (batch["compared"][..., None] == text) & answers[..., None]  # [B, T, 2, T]
    named = misses(rows[NAMING][:, 0, :, 1:p], batch["named"])
    look = torch.stack([misses(rows[i][:, 0, :, :p], batch["look"] & answers) for i in ANSWERING]).mean()
    pair = torch.stack([misses(rows[i][:, 1 + j, :, p:], ends[:, :, j]) for i in ANSWERING for j in (0, 1)]).mean()
    answer = F.cross_entropy(logits.float(), targets)
    right = (logits.argmax(-1) == targets).float().mean()
    loss = answer + guidance * (look + named + pair)
    return {"loss": loss, "answer": answer, "look": look, "named": named, "pair": pair, "right": right}


def symbolic_loss(
    model: LlavaForConditionalGeneration, symbols: Symbols, device: torch.device
) -> Callable[[Any, int], Losses]:
    """Returns the loss of a symbolic batch."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        batch = {k: v.to(device) for k, v in batch.items()}
        visual = symbols(model.get_input_embeddings(), batch, batch["where"])
        return guided_answers(model, visual, batch["where"], batch["valid"], batch)

    return loss_of
