"""Packs many question-answer turns about one picture into one sequence, so that the picture is paid for once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import GRID

BOS, EOS = 2, 3
_IDS = {piece: i for i, piece in enumerate(vocabulary())}


def token_ids(text: str) -> list[int]:
    """Tokenises a sentence of known words and numbers, as the tokenizer does, without its overhead."""
    out: list[int] = []
    for word in text.replace("?", " ?").split():
        if word in _IDS:
            out.append(_IDS[word])
        else:
            out += [_IDS[c if i == 0 else f"##{c}"] for i, c in enumerate(word)]
    return out


def pack(turns: list[tuple[str, str]], length: int) -> dict[str, np.ndarray]:
    """Lays turns one after another.

    Args:
        turns: (prompt, answer) pairs.
        length: Of the result; turns that don't fit are left out.

    Returns:
        ids, targets (next token at answer positions, else -100), turn (index of the turn, -1 for padding) and
        place (position within the turn), each int64 of [length].
    """
    ids = np.zeros(length, np.int64)
    targets = np.full(length, -100, np.int64)
    turn = np.full(length, -1, np.int64)
    place = np.zeros(length, np.int64)
    at = 0
    for i, (prompt, answer) in enumerate(turns):
        question = token_ids(prompt + " answer :")
        reply = [*token_ids(answer), EOS]
        n = len(question) + len(reply) - 1
        if at + n > length:
            break
        ids[at : at + n] = (question + reply)[:-1]
        targets[at + len(question) - 1 : at + n] = reply
        turn[at : at + n] = i
        place[at : at + n] = np.arange(n)
        at += n
    return {"ids": ids, "targets": targets, "turn": turn, "place": place}


def turn_mask(visual_valid: Tensor, visual_place: Tensor, turn: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """Builds the additive mask under which every turn is alone with the picture.

    Args:
        visual_valid: [B, V] bool, V counts the start token and the visual tokens.
        visual_place: [B, V] positions of those.
        turn: [B, T] index of the turn of every text token, -1 for padding.
        place: [B, T] position within the turn.
        dtype: Of the mask.

    Returns:
        [B, 1, V + T, V + T]; 0 where seen, the smallest number elsewhere.
    """
    b, v = visual_valid.shape
    t = turn.shape[1]
    see = torch.zeros(b, v + t, v + t, dtype=torch.bool, device=turn.device)
    see[:, :v, :v] = (visual_place[:, :, None] >= visual_place[:, None]) & visual_valid[:, None]
    see[:, v:, :v] = visual_valid[:, None]
    see[:, v:, v:] = (turn[:, :, None] == turn[:, None]) & (place[:, :, None] >= place[:, None])
    see |= torch.eye(v + t, dtype=torch.bool, device=turn.device)
    mask = torch.zeros(see.shape, dtype=dtype, device=turn.device)
    return mask.masked_fill_(~see, torch.finfo(dtype).min)[:, None]


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
