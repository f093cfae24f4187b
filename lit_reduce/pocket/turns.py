"""Packs many question-answer turns about one picture into one sequence, so that the picture is paid for once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lit_reduce.pocket.words import vocabulary

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
