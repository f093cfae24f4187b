"""Further turns on the cache of a shortened prompt: the caller counts all tokens, the cache only those that stayed."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError

_NAME = "_lit_reduce_history"  # kept on the cache itself, so that it follows copies and dies with it


@dataclass(frozen=True)
class History:
    """The tokens that the caller has passed so far (L) and those of them that are in the cache (S).

    Attributes:
        given: ``[B, L]`` ids as the caller counts them.
        input_ids: ``[B, S]``.
        mask: ``[B, S]``.
        positions: ``[B, S]``, or ``[R, B, S]`` of a model with R rows of positions; so everywhere in this module.
        next: ``[B, 1]``, the position of the next token.
    """

    given: Tensor
    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    next: Tensor

    @property
    def length(self) -> int:
        """L, the tokens that the caller counts."""
        return self.given.shape[1]

    @classmethod
    def after(cls, given: Tensor, short: dict[str, Any], positions: Tensor, mask: Tensor) -> "History":
        """The history that a prompt leaves: its short form, and the positions and mask that follow-ups continue."""
        # Behind the last token, which need not have the highest position: frames of a video may count further.
        last = (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).argmax(1, keepdim=True)
        following = positions.gather(-1, last.expand(*positions.shape[:-1], 1)) + 1
        return cls(given, short["input_ids"], short["attention_mask"].long(), short["position_ids"], following)

    def repeat(self, times: int) -> "History":
        """The history of a batch whose rows were repeated by ``num_return_sequences``."""
        if times == 1:
            return self
        return History(*(getattr(self, x.name).repeat_interleave(times, -2) for x in fields(self)))

    def write(self, cache: Any) -> None:
        """Leave the history on the cache that it describes."""
        setattr(cache, _NAME, self)


def cached_length(cache: Any) -> int:
    """Tokens in a cache; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def history_of(cache: Any) -> History | None:
    """The history on a cache that is not empty, or None: nothing was dropped from it.

    Raises:
        UserError: the cache was cut to less than the prompt.
    """
    found: History | None = getattr(cache, _NAME, None)
    length = cached_length(cache)
    if found is None or length == 0:
        return None
    if length < found.input_ids.shape[1]:
        raise UserError("the cache was cropped into its shortened prompt; start the conversation with a new cache")
    return found


def plain_history(input_ids: Tensor, mask: Tensor, cached: int, deltas: Tensor | None = None) -> History:
    """The history of a cache from which nothing was dropped.

    Args:
        input_ids: ``[B, L']``, the caller's.
        mask: ``[B, L']``.
        cached: Tokens in the cache.
        deltas: ``[B, 1]``, by how much a model with several rows of positions counts less (or more) than tokens, as it
            noted when it read the cached ones.
    """
    ids, seen = input_ids[:, :cached], mask[:, :cached].long()
    positions, following = (seen.cumsum(1) - 1).clamp(min=0), seen.sum(1, keepdim=True)
    if deltas is not None and len(deltas) == len(ids):  # the text's row, and three of frames, rows and columns
        following = torch.stack([following, *[following + deltas.to(following)] * 3])
        positions = positions.expand(4, -1, -1)  # those of what is cached are never read again
    return History(ids, ids, seen, positions, following)


@dataclass(frozen=True)
class Tail:
    """What follows a history: tokens that the model generated into the cache, and fresh ones.

    Attributes:
        generated: ``[B, G]`` ids already in the cache.
        fresh: ``[B, F]`` ids that are not.
        mask: ``[B, G + F]``.
        positions: ``[B, G + F]``.
    """

    generated: Tensor
    fresh: Tensor
    mask: Tensor
    positions: Tensor


def tail_of(history: History, cached: int, ids: Tensor, mask: Tensor | None) -> Tail:
    """Split a caller's full sequence ``ids`` ``[B, L']`` (with its mask) after what the history covers.

    Raises:
        UserError: the sequence does not continue the cached one.
    """
    done = cached - history.input_ids.shape[1]
    tail = ids[:, history.length :]
    if tail.shape[1] <= done or not torch.equal(ids[:, : history.length], history.given):
        raise UserError(
            f"input_ids {tuple(ids.shape)} do not continue the cached {(len(ids), history.length + done)}; "
            "pass the returned sequences with the new tokens behind them"
        )
    rest = torch.ones_like(tail) if mask is None else mask[:, history.length :].long()
    positions = (history.next + rest.cumsum(1) - 1).clamp(min=0)
    return Tail(tail[:, :done], tail[:, done:], rest, positions)


def joined(history: History, tail: Tail, fresh: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the next turn in the cache's counting; ``fresh`` is the short form of the fresh tokens."""
    done = tail.generated.shape[1]
    return fresh | {
        "input_ids": torch.cat([history.input_ids, tail.generated, fresh["input_ids"]], 1),
        "attention_mask": torch.cat([history.mask, tail.mask[:, :done], fresh["attention_mask"]], 1),
        "position_ids": torch.cat([history.positions, tail.positions[..., :done], fresh["position_ids"]], -1),
    }
