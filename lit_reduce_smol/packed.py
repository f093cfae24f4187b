"""Many answers behind one picture: each sees the picture, its own question and itself, so the picture is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Turn = tuple[str, Sequence[str]]  # a question and its right answers
OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass
class Packed:
    """The turns of one picture, behind the prefix.

    Attributes:
        ids: ``[S]`` token ids of all questions and answers.
        positions: ``[S]``, counted from the prefix's end.
        seen: ``[S, S]``, true where a token (row) sees another one (column).
        sources: ``[T]``, where a token is predicted.
        targets: ``[T]``, the token that should come.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    sources: Tensor
    targets: Tensor


def pack(turns: Sequence[Turn], tokenizer: Any) -> Packed:
    """Lay out the turns of one picture."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []  # where a question and one of its answers begin and end
    sources: list[int] = []
    targets: list[int] = []
    for question, answers in turns:
        asked = encode(tokenizer, question + CLOSE)
        first = len(ids)
        ids += asked
        positions += range(len(asked))
        spans.append((first, len(ids), first, len(ids)))
        for answer in answers:
            said = encode(tokenizer, answer + END)
            start = len(ids)
            ids += said[:-1]
            positions += range(len(asked), len(asked) + len(said) - 1)
            spans.append((first, first + len(asked), start, len(ids)))
            sources += [first + len(asked) - 1, *range(start, len(ids))]
            targets += said
    seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for first, last, start, end in spans:
        seen[start:end, first:last] = True
        seen[start:end, start:end] = True
    seen &= torch.ones_like(seen).tril()
    where, when, what = torch.tensor(sources), torch.tensor(positions), torch.tensor(targets)
    return Packed(torch.tensor(ids), when, seen, where, what)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without anything added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@dataclass
class Batch:
    """The turns of several pictures, padded.

    Attributes:
        ids, positions: ``[B, S]``.
        seen: ``[B, S, S]``.
        sources: ``[T]``, into ``B * S`` rows.
        targets: ``[T]``.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    sources: Tensor
    targets: Tensor


def collate(rows: Sequence[Packed], multiple: int = 1) -> Batch:
    """Pad to the longest row, rounded up to a multiple."""
    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], positions[i, :n], seen[i, :n, :n] = row.ids, row.positions, row.seen
    sources = torch.cat([row.sources + i * length for i, row in enumerate(rows)])
    return Batch(ids, positions, seen, sources, torch.cat([row.targets for row in rows]))
