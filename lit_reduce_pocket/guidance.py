"""Guidance: some heads of the decoder are shown where to look, and what to bring from there.

Binding (which number is on the red circle) is the slow thing to learn. Without guidance the decoder guesses among the
things in view for tens of thousands of questions before it begins.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from lit_reduce_pocket.attention import attend, attending, logits_of
from lit_reduce_pocket.loop import Losses
from lit_reduce_pocket.questions import Question, gap_of
from lit_reduce_pocket.symbols import MOST, Symbols
from lit_reduce_pocket.turns import answer_logits
from lit_reduce_pocket.world import SIZE, Thing

NAMING, ANSWERING = 1, (2, 3)  # decoder layers whose first heads are shown where to look, for names and for answers


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
        spot [T, 2]: column and row of that centre, from -1 to 1.
        tally [T]: for the tokens of an answer to "how many", the number; -1 for others.
        compared [T, 2]: for the tokens of an answer about two things, where their names end in T; -1 for others.
        gap [T]: for these, how far the first lies on the side asked for, from -2 to 2.
    """
    turn, place = packed["turn"], packed["place"]
    look = np.zeros((turn.max() + 2, 1 + owner.shape[1]), bool)  # the last row, of padding (turn -1), stays empty
    named = np.zeros((len(turn), owner.shape[1]), bool)
    spot = np.zeros((len(turn), 2), np.float32)
    tally, compared = np.full(len(turn), -1), np.full((len(turn), 2), -1)
    gap = np.zeros(len(turn), np.float32)
    for j, question in enumerate(asked):
        about = [things.index(t) for t in question.about]
        counted = question.prompt.startswith("how many")
        look[j, 0] = counted or question.family == "presence"
        look[j, 1:] = np.isin(owner[2], about) | (np.isin(owner[1], about) & (owner[2] < 0) & (not counted))
        if counted:
            tally[turn == j] = len(about)
        ends = []
        for at, thing in named_things(question):
            token = (turn == j) & (place == at)
            named[token] |= owner[2] == things.index(thing)
            spot[token] = 2 * thing.x / SIZE - 1, 2 * thing.y / SIZE - 1
            ends += list(token.nonzero()[0])
        if question.family == "relation" and len(ends) == 2:
            compared[turn == j] = ends
            gap[turn == j] = 2 * gap_of(question) / SIZE
    return {"look": look[turn], "named": named, "spot": spot, "tally": tally, "compared": compared, "gap": gap}


def named_things(question: Question) -> list[tuple[int, Thing]]:
    """Returns the things that a prompt names as "red circle", each with the place of its last word."""
    words = question.prompt.split()
    pairs = list(enumerate(pairwise(words), 1))
    return [(at, t) for t in question.about for at, pair in pairs if pair == (t.color, t.shape)]


class Watched:
    """Log-probabilities and outputs of the guided heads from text token `first` on, by layer; None: nobody watches."""

    rows: dict[int, tuple[Tensor, Tensor]] | None = None
    first = 0


def watched_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """Attention, which also reports where the first three heads of the guided layers look."""
    out = attend(q, k, v, mask, scaling)
    if Watched.rows is not None and module.layer_idx in (NAMING, *ANSWERING):
        heads, text = slice(3), slice(Watched.first, None)
        logits = logits_of(q[:, heads, text], k[:, heads], mask[:, :, text], scaling)
        Watched.rows[module.layer_idx] = logits.log_softmax(-1), out[:, heads, text].float()
    return out.transpose(1, 2).contiguous(), None


WATCHED = "pocket_watched"
AttentionInterface.register(WATCHED, watched_attention)


def misses(logp: Tensor, goal: Tensor) -> Tensor:
    """KL from the shares of ``goal`` [B, T, P] to attention [B, T, P], mean over rows that have a goal."""
    some = goal.any(-1)
    share = (goal / goal.sum(-1, keepdim=True).clamp(min=1))[some]
    return (share * (share.clamp(min=1e-9).log() - logp[some])).sum(-1).sum() / some.sum().clamp(min=1)


def guided_answers(
    model: LlavaForConditionalGeneration,
    symbols: Symbols,
    visual: Tensor,
    where: Tensor,
    valid: Tensor,
    batch: dict[str, Tensor],
    guidance: float = 0.5,
    start: float = 1.0,
    counted: float = 1.0,
) -> Losses:
    """Asks packed turns and shows some heads where to look.

    Cross-entropy at the answers, and guidance. Where a thing is named, head 0 of one layer shall look at it. Where an
    answer is given, head 0 of two later layers shall look at the things that decide it, and heads 1 and 2 at the names
    of the two things that are compared. What a head brings from a name shall say where the thing is, and what it brings
    from counted things how many they are.

    Args:
        model: Pocket.
        symbols: Holds the read-outs of what the heads bring.
        visual: [B, P, D], as `where` and `valid` see `answer_logits`.
        where: [B, P].
        valid: [B, P].
        batch: Of `pack` and `sights_of`.
        guidance: Weight of the guidance.
        start: As how many things the start token is looked at where things are counted. What is left on it says how
            many there are, start / (start + n): at 4 five and six differ nearly twice as much as at 1.
        counted: Weight of the answers to "how many", and of what is guided there; that of the others is 1.

    Returns:
        "loss", its parts, and "right", the share of right answer tokens.
    """
    Watched.first = p = where.shape[1] + 1
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    Watched.rows = rows
    try:
        with attending(model.config.text_config, WATCHED):
            logits, targets = answer_logits(model, visual, where, valid, batch)
    finally:
        Watched.rows = None
    answers = (batch["targets"] >= 0)[..., None]
    text = torch.arange(batch["ids"].shape[1], device=where.device)
    ends = (batch["compared"][..., None] == text) & answers[..., None]  # [B, T, 2, T]
    looks, brings = {i: row[0] for i, row in rows.items()}, {i: row[1] for i, row in rows.items()}
    named = misses(looks[NAMING][:, 0, :, 1:p], batch["named"])
    goal = (batch["look"] & answers).float()
    goal[..., 0] *= torch.where(batch["tally"] >= 0, start, 1.0)
    look = torch.stack([misses(looks[i][:, 0, :, :p], goal) for i in ANSWERING]).mean()
    there = batch["named"].any(-1)
    spots = [(symbols.spots[0](brings[NAMING][:, 0])[there], batch["spot"][there])]
    pair = []
    for n, (i, j) in enumerate((i, j) for i in ANSWERING for j in (0, 1)):
        pair.append(misses(looks[i][:, 1 + j, :, p:], ends[:, :, j]))
        name = batch["compared"][:, :, j].clamp(min=0)
        both = ends[:, :, j].any(-1) & there.gather(1, name)
        goal = batch["spot"].gather(1, name[..., None].expand(-1, -1, 2))
        spots.append((symbols.spots[1 + n](brings[i][:, 1 + j])[both], goal[both]))
    apart = torch.stack([(said - goal).square().sum() / max(1, len(goal)) for said, goal in spots]).mean()
    counts = (batch["tally"] >= 0) & answers[..., 0]
    said = torch.stack([read(brings[i][:, 0][counts]) for i, read in zip(ANSWERING, symbols.tallies, strict=True)])
    goal = batch["tally"][counts].clamp(max=MOST).expand(len(said), -1)
    tally = F.cross_entropy(said.flatten(0, 1), goal.flatten(), reduction="sum") / max(1, goal.numel())
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    weight = torch.where(batch["tally"][answers[..., 0]] >= 0, counted, 1.0)
    answer = (each * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == targets).float().mean()
    paired = torch.stack(pair).mean()
    loss = answer + guidance * (look + named + paired + counted * tally) + apart
    return {
        "loss": loss,
        "answer": answer,
        "look": look,
        "named": named,
        "pair": paired,
        "spot": apart,
        "tally": tally,
        "right": right,
    }
