"""One pass of a prompt through the language model, in which later layers work on fewer tokens than earlier ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import Grid
from lit_reduce.errors import UserError
from lit_reduce.runtime.decoder.slot_cache import PAD
from lit_reduce.runtime.encode import IGNORE, placeholders
from lit_reduce.runtime.gather import gather_filled, gather_rows, left_padded, right_padded

CLOSED = 1e-9  # weight of a key whose gate is shut


@dataclass(frozen=True)
class Picture:
    """The visual tokens of one image inside the language model; what changes makes a new one.

    Attributes:
        number: Tells the pictures of a prompt apart.
        row: Which sample of the batch it stands in.
        grid: Frames, rows and columns where it entered.
        columns: ``[n]``, where its tokens stand among the tokens that the layer at hand works on.
        kept_indices: ``[n]``, which of the image's first tokens they are.
        size: ``[n]``, how many of the first tokens each stands for.
        given: Signals from before the language model, one entry a token.
        stages: How many tokens stay from before each decoder layer on.
        cached: How many keys stay in each layer's cache at the end of the prompt.
        entered: Tokens with which it entered.
        keep: Its budget.
        gate: ``[n]``, how far each token is open to the attention of others; None when all of them are.
        since: The layer of its last stage.
        spent: Tokens that the layers before that one worked on, summed.
    """

    number: int
    row: int
    grid: Grid
    columns: Tensor
    kept_indices: Tensor
    size: Tensor
    given: dict[str, Tensor] = field(default_factory=dict)
    stages: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    entered: int = 0
    keep: int = 0
    gate: Tensor | None = None
    since: int = 0
    spent: Tensor | float = 0.0

    @property
    def open(self) -> Tensor:
        """``[n]``, the gates."""
        return torch.ones(self.count, device=self.columns.device) if self.gate is None else self.gate

    @property
    def count(self) -> int:
        """Tokens that are left, n."""
        return len(self.columns)

    def only(self, chosen: Tensor) -> "Picture":
        """The picture with the ``chosen`` ones of its tokens left."""
        given = {name: x[chosen] for name, x in self.given.items()}
        columns, kept_indices, size = self.columns[chosen], self.kept_indices[chosen], self.size[chosen]
        gate = None if self.gate is None else self.gate[chosen]
        return replace(self, columns=columns, kept_indices=kept_indices, size=size, given=given, gate=gate)

    def at(self, layer: int) -> "Picture":
        """The picture at a stage, with what it has spent until there."""
        size = self.count if self.gate is None else self.gate.sum()
        return replace(self, since=layer, spent=self.spent + size * (layer - self.since))

    def gated(self, gate: Tensor) -> "Picture":
        """The picture with further gates ``[n]``."""
        return replace(self, gate=self.open * gate)

    def moved(self, columns: Tensor) -> "Picture":
        """The picture with its tokens at other places."""
        return replace(self, columns=columns)


@dataclass(frozen=True)
class Prompt:
    """What the language model is about to read.

    Attributes:
        pictures: Its images, those of the first sample first.
        real: ``[B, L]`` bool, false at padding.
        text: ``[B, T]`` columns of the prompt's text tokens, packed to the left.
        text_mask: ``[B, T]``, which of them are real.
        last: ``[B]``, the column of the last token of the prompt.
    """

    pictures: list[Picture]
    real: Tensor
    text: Tensor
    text_mask: Tensor
    last: Tensor

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any], counts: Sequence[int], grids: Sequence[Grid]) -> "Prompt":
        """Read a prompt.

        Args:
            model: The backbone.
            inputs: ``input_ids``, ``attention_mask`` and, when training, ``labels``: no reducer sees answer tokens.
            counts: Visual tokens of each image.
            grids: And its grid.
        """
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        visual = placeholders(model, ids)
        asked = real if labels is None else real & (labels == IGNORE)
        rows, columns = torch.cat([part.nonzero() for part in _by_kind(model, ids, visual)]).unbind(1)
        ones = torch.ones(max([*counts, 0]), device=ids.device)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        pictures = [
            Picture(
                i,
                int(rows[start]),
                grid,
                place,
                torch.arange(len(place), device=ids.device),
                ones[: len(place)],
                entered=len(place),
            )
            for i, (start, place, grid) in enumerate(zip(starts, columns.split(list(counts)), grids, strict=True))
        ]
        words = asked & ~visual
        text, text_mask = right_padded(words)
        place = torch.arange(ids.shape[1], device=ids.device)
        return cls(pictures, real, text, text_mask, (asked * place).argmax(1))

    def repeat(self, times: int) -> "Prompt":
        """The prompt of a batch whose samples were each repeated, for beams or several answers."""
        if times == 1:
            return self
        many = [(p.row * times + i, p) for p in self.pictures for i in range(times)]
        pictures = [replace(p, number=number, row=row) for number, (row, p) in enumerate(many)]
        return Prompt(
            pictures, *(x.repeat_interleave(times, 0) for x in (self.real, self.text, self.text_mask, self.last))
        )

    def behind_padding(self) -> "Prompt":
        """The prompt with one more column of padding on its left."""
        pictures = [picture.moved(picture.columns + 1) for picture in self.pictures]
        real = torch.nn.functional.pad(self.real, (1, 0), value=False)
        return replace(self, pictures=pictures, real=real, text=self.text + 1, last=self.last + 1)


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
        self.pictures: list[Picture] = [] if prompt is None else prompt.pictures
        if prompt is not None:
            self.text, self.last = prompt.text, prompt.last
            more = length - prompt.real.shape[1]  # tokens that transformers guesses behind a prompt, or has answered
            self.real = torch.nn.functional.pad(prompt.real, (0, more), value=True)

    def copy(self) -> "PrefillState":
        """The state now; `narrow` replaces tensors and never writes into them."""
        twin = PrefillState.__new__(PrefillState)
        twin.__dict__.update(self.__dict__)
        return twin

    def narrow(self, hidden: Tensor, gone: Iterable[tuple[Picture, Tensor]]) -> Tensor:
        """Let tokens go, and padding with them.

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


def _by_kind(model: Any, ids: Tensor, visual: Tensor) -> list[Tensor]:
    """Where images stand, then where videos stand: the order in which they are encoded."""
    image = visual & (ids == model.config.image_token_id)
    return [image, visual & ~image]
