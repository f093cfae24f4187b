"""Runs a reducer before a block of the vision tower, or between its attention and its MLP.

Where the projector takes each token by itself (LLaVA-1.5, PaliGemma) the sequence stays short, and the language model
gets only what is left. Projectors that need the whole grid (tiles, shuffles, pooling) get it back: a token that was
dropped with the state in which it left, a merged one as a copy of what it became; they save time in the tower alone.
"""

from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import Family
from lit_reduce.backbones.layouts import Inputs, Layout
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call_reducer, now
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.vision.base import TowerHooks, as_token
from lit_reduce.tokens import Budget, Reduction, VisualTokens


@dataclass(frozen=True)
class State:
    """The n of N patches that are left in the middle of the tower, of T images (tiles) with C channels.

    Attributes:
        kept_indices: ``[T, n]``, which patches the n tokens are, ascending.
        owner: ``[T, N]``, the token that each patch went into, -1 for none.
        bank: ``[T, N, C]``, the last state of patches that are gone; C is 0 where nobody wants them back.
        size: ``[T, n]``, patches that each token stands for, or None while all stand for themselves.
        stages: How many tokens stay, by block.
    """

    kept_indices: Tensor
    owner: Tensor
    bank: Tensor
    size: Tensor | None
    stages: dict[int, int]

    @classmethod
    def whole(cls, x: Tensor, stages: dict[int, int]) -> "State":
        """Nothing is gone yet from ``x`` ``[T, N, C]``."""
        order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return cls(order, order, x, None, stages)

    def after(self, reduction: Reduction, x: Tensor) -> "State":
        """What a reduction of ``x`` ``[T, n, C]`` leaves."""
        kept_indices, into = reduction.kept_indices, reduction.assignment
        if into is None:
            places = torch.arange(kept_indices.shape[1], device=kept_indices.device).expand_as(kept_indices)
            into = torch.full_like(self.kept_indices, -1).scatter(1, kept_indices, places)
        owner = torch.where(self.owner >= 0, into.gather(1, self.owner.clamp(min=0)), -1)
        size = reduction.size if self.size is None or reduction.size is not None else self.size.gather(1, kept_indices)
        return State(self.kept_indices.gather(1, kept_indices), owner, self.full(x), size, self.stages)

    def full(self, x: Tensor) -> Tensor:
        """All patches ``[T, N, C]`` from the tokens that are left."""
        copies = x.gather(1, self.owner.clamp(min=0)[..., None].expand_as(self.bank))
        return torch.where((self.owner >= 0)[..., None], copies, self.bank)


class BatchedTowerHooks(TowerHooks):
    """Runs a reducer inside a tower that takes images (tiles) of one size as a batch.

    Attributes:
        state: What the last pass left; None when it kept all, or gave all back.
    """

    def __init__(self, model: Any, family: Family, reducer: Reducer, keep: Budget) -> None:
        super().__init__(model, reducer, keep)
        self.short = family.tokenwise
        self.state: State | None = None

    def _patch(self, patches: Patches) -> None:
        super()._patch(patches)
        for number, block in enumerate(self.tower.blocks):
            if number < self.tower.depth:  # those behind feed nothing, but must bear the shorter sequence
                patches.replace_forward(block, partial(self._block, number))
            patches.replace_forward(self.tower.attention(number), self._attention)

    def left(self, layout: Layout, inputs: Inputs, counts: list[int]) -> list[Tensor]:  # noqa: ARG002  (of `TowerHooks`)
        """See `TowerHooks`."""
        return list(self.state.kept_indices) if self.short and self.state is not None else []

    def sizes(self) -> list[Tensor] | None:
        """See `TowerHooks`."""
        return None if self.state is None or self.state.size is None else list(self.state.size)

    def whole(self, text: str, block: int, x: Tensor, output: bool) -> Tensor:
        """See `TowerHooks`; where the features stay short, patches that are gone get zeros, which nobody will read."""
        if not self.short or self.state is None:
            return super().whole(text, block, x, output)
        there = (self.leaves if output else self.reads).get(block)
        if there is None:
            return x
        x = x[:, -there.shape[1] :]
        index = there[..., None].expand_as(x)
        return x.new_zeros(len(x), self.state.owner.shape[1], x.shape[2]).scatter(1, index, x)

    def _block(self, number: int, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One block of the tower, with what the reducer does before it or in its middle."""
        if number == 0:
            self.state, self.reads, self.leaves = None, {}, {}
            patches = hidden.shape[1] - self.tower.prefix
            left = self.reducer.stages(self.tower.depth, patches, self.keep.count(patches))
            if any(count < patches for count in left.values()):
                patch_states = hidden[:, self.tower.prefix :]
                self.state = State.whole(patch_states[..., :0] if self.short else patch_states, left)
        if self.state is None:
            return plain(hidden, *args, **kwargs)
        count = self.state.stages.get(number, self.state.kept_indices.shape[1])
        fewer = count < self.state.kept_indices.shape[1]
        if fewer and self.point == "before":
            hidden = self._reduce(hidden, count, number)
        self._note(self.reads, number)
        if fewer and self.point == "attention":
            hidden = self._run(
                number, plain, hidden, partial(self._reduce, count=count, number=number), *args, **kwargs
            )
        else:
            with self._reading(number, self.point == "before" and number + 1 in self.state.stages):
                hidden = plain(hidden, *args, **kwargs)
        self._note(self.leaves, number)
        if number == self.tower.feature and not self.short:
            hidden = torch.cat([hidden[:, : self.tower.prefix], self.state.full(hidden[:, self.tower.prefix :])], 1)
            self.state = None
            self.leaves.pop(number, None)
        return hidden

    def _note(self, where: dict[int, Tensor], number: int) -> None:
        if self.state is not None and self.state.kept_indices.shape[1] < self.state.owner.shape[1]:
            where[number] = self.state.kept_indices

    def _reduce(self, hidden: Tensor, count: int, number: int) -> Tensor:
        """Fewer tokens, the prefix untouched."""
        assert self.state is not None
        start, state = now(hidden), self.state
        prefix, x = hidden.split([self.tower.prefix, hidden.shape[1] - self.tower.prefix], 1)
        side = isqrt(x.shape[1])
        grid = (1, side, side) if side**2 == x.shape[1] else (1, 1, x.shape[1])
        given = {text: self._signal(signal.name, x) for text, signal in self.signals.items()}
        tokens = VisualTokens(x, grid, given, number)
        reduction = call_reducer(self.reducer, tokens, count)
        if reduction.valid is not None and not bool(reduction.valid.all()):
            raise UserError(f"'{self.reducer.name}' keeps another count of each image, which no vision tower can do")
        new = reduction.gather(tokens).to(x.dtype)
        self.state = state.after(reduction, x)
        self._elapsed_ms += 1000 * (now(hidden) - start)
        return torch.cat([prefix, new], 1)

    def _signal(self, name: str, x: Tensor) -> Tensor:
        if name == "size":
            size = self.state.size if self.state is not None else None
            return x.new_ones(x.shape[:2]) if size is None else size
        return as_token(name, self._read(name))

    def _attention(self, plain: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's attention, whose mask follows the tokens and counts each for its size (ToMe, eq. 1)."""
        state = self.state
        if state is None:
            return plain(hidden_states, *args, **kwargs)
        if kwargs.get("attention_mask") is not None or state.size is not None:
            kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), state, hidden_states.dtype)
        return plain(hidden_states, *args, **kwargs)

    def _mask(self, mask: Tensor | None, state: State, dtype: torch.dtype) -> Tensor:
        prefix = self.tower.prefix
        first = torch.arange(prefix, device=state.kept_indices.device).expand(len(state.kept_indices), -1)
        index = torch.cat([first, state.kept_indices + prefix], 1)
        if mask is not None:
            mask = mask.expand(len(index), *mask.shape[1:])
            mask = mask.gather(-1, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
            if mask.shape[2] > 1:
                mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        if state.size is None:
            assert mask is not None
            return mask
        size = torch.cat([torch.ones_like(first, dtype=state.size.dtype), state.size], 1)
        bias = size.log().to(dtype)[:, None, None]
        if mask is None:
            return bias
        return bias.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask
