"""One pass of a prompt through the language model, in which later layers work on fewer tokens than earlier ones."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.runtime.decoder.prompt import ImageTokens, Prompt
from lit_reduce.runtime.decoder.slot_cache import PAD
from lit_reduce.runtime.gather import gather_filled, gather_rows, left_padded

CLOSED = 1e-9  # weight of a key whose gate is shut


class PrefillState:
    """The tokens that the layer at hand works on.

    Attributes:
        length: Logical tokens of this pass, Q.
        slots: ``[B, n]``, their logical slots; `PAD` where a sample has fewer than the longest.
        index: ``[B, n]``, their places among the Q; None while all are there.
        padded: Whether some slots are `PAD`.
        pictures: The images with what is left of them.
        text: ``[B, T]`` places of the prompt's text, see `Prompt`.
        last: ``[B]``.
    """

    def __init__(self, prompt: Prompt | None, batch: int, length: int, past: Any, device: torch.device) -> None:
        self.length, self.prompt = length, prompt
        self.slots: Tensor = (torch.arange(length, device=device) + past).expand(batch, -1)
        self.index: Tensor | None = None
        self.padded = False
        self.pictures: list[ImageTokens] = [] if prompt is None else prompt.pictures
        if prompt is not None:
            self.text, self.last = prompt.text, prompt.last
            more = length - prompt.real.shape[1]  # tokens that transformers guesses behind a prompt, or has answered
            self.real = torch.nn.functional.pad(prompt.real, (0, more), value=True)

    def copy(self) -> "PrefillState":
        """The state now; `narrow` replaces tensors and never writes into them."""
        twin = PrefillState.__new__(PrefillState)
        twin.__dict__.update(self.__dict__)
        return twin

    def narrow(self, hidden: Tensor, gone: Iterable[tuple[ImageTokens, Tensor]]) -> Tensor:
        """Drop tokens, and padding with them.

        Args:
            hidden: ``[B, n, D]``.
            gone: Pictures that lose tokens, and ``[n_i]`` which of their tokens stay.

        Returns:
            ``[B, m, D]``, padded on the left.
        """
        changed = {id(picture): stay for picture, stay in gone}
        keep = self.real if self.index is None else self.slots != PAD
        keep = keep.clone()
        pictures = []
        for picture in self.pictures:
            stay = changed.get(id(picture))
            if stay is not None:
                keep[picture.row, picture.columns] = stay
                picture = picture.only(stay.nonzero()[:, 0])
            pictures.append(picture)
        order, valid, self.padded = left_padded(keep)
        self.index = order if self.index is None else self.index.gather(1, order)
        self.slots = gather_filled(self.slots, order, valid, PAD)
        # Where each old column went: its rank among the kept ones, behind the padding.
        moved = (keep.cumsum(1) - 1 + order.shape[1] - keep.sum(1, keepdim=True)).clamp(min=0)
        self.pictures = [p.moved(moved[p.row, p.columns]) for p in pictures]
        self.text, self.last = moved.gather(1, self.text), moved.gather(1, self.last[:, None])[:, 0]
        return gather_rows(hidden, order, 1)

    def spread(self, hidden: Tensor, over: Tensor, before: "PrefillState | None" = None) -> Tensor:
        """Put ``hidden`` ``[B, n, D]`` back into ``over``: all tokens of the pass, or those of an earlier state."""
        if self.index is None or (before is not None and before.index is self.index):
            return hidden
        index = self.index
        if before is not None and before.index is not None:
            rank = torch.zeros(len(index), self.length, dtype=torch.long, device=index.device)
            places = torch.arange(before.index.shape[1], device=index.device).expand_as(before.index)
            index = rank.scatter(1, before.index, places).gather(1, index)
        valid = (self.slots != PAD)[..., None]
        index = index[..., None].expand_as(hidden)
        return over.scatter(1, index, torch.where(valid, hidden, over.gather(1, index)))

    def mask(self, mask: Tensor | None, keys: Tensor, padded: bool, flash: bool) -> Tensor | None:
        """The attention mask of this layer: the logical mask, read at the slots of its queries and keys.

        Args:
            mask: Logical mask as transformers made it: None, ``[B, K]`` for flash attention, or ``[B, 1, Q, K]``,
                boolean or additive.
            keys: ``[B, k]``, the slots of the layer's keys.
            padded: Whether some of these are `PAD`.
            flash: Whether the layer runs flash attention.
        """
        seen, queries = keys != PAD, self.slots.shape[1]
        if mask is None:  # causal, without padding
            # A kernel's own causal mask is right where keys and queries are the same tokens, or one query sees all.
            if not padded and (queries == 1 or flash or keys.shape[1] == queries):
                return None
            if flash:
                return seen
            causal = keys[:, None] <= self.slots[..., None]
            return (causal & seen[:, None] | self._blind())[:, None]
        columns = keys.clamp(min=0)
        if mask.ndim == 2:  # padding only: order is kept, so what is causal stays causal
            return gather_rows(mask, columns, 1).bool() & seen
        if self.index is not None:
            mask = gather_rows(mask, self.index, 2)
        mask, seen = gather_rows(mask, columns, 3), seen[:, None, None]
        if mask.dtype == torch.bool:
            return mask & seen | self._blind()[:, None]
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    def gated(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask of this layer, with the logarithms of the visual keys' gates added where they are not all open.

        A token always sees itself in full, so that no row is left without a key.

        Args:
            mask: As `mask` made it, or transformers; keys of other passes stand before this pass's.
            dtype: Of the hidden states.
        """
        pictures = [picture for picture in self.pictures if picture.gate is not None]
        if not pictures:
            return mask
        count, low = self.slots.shape[1], torch.finfo(dtype).min
        if mask is None:  # causal, without padding
            mask = torch.ones(count, count, dtype=torch.bool, device=self.slots.device).tril()[None, None]
        if mask.ndim == 2:
            raise UserError("gates need masks that can be added to; load the backbone with sdpa or eager")
        gates = torch.cat([picture.open for picture in pictures]).clamp_min(CLOSED).log().to(dtype)
        rows = torch.cat([torch.full_like(picture.columns, picture.row) for picture in pictures])
        bias = gates.new_zeros(self.slots.shape).index_put((rows, torch.cat([p.columns for p in pictures])), gates)
        oneself = torch.eye(count, dtype=torch.bool, device=bias.device)
        bias = bias[:, None].expand(-1, count, -1).masked_fill(oneself, 0)
        bias = torch.nn.functional.pad(bias, (mask.shape[3] - count, 0))[:, None]
        return torch.where(mask, bias, low) if mask.dtype == torch.bool else (mask + bias).clamp(min=low)

    def _blind(self) -> Tensor:
        """``[B, n, 1]``, queries that are padding: they may see all, for a row without any key would become NaN."""
        return (self.slots == PAD)[..., None]
