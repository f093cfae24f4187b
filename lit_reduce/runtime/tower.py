"""Reducers at work inside the vision tower: before a block, or between its attention and its MLP.

Where the projector takes each token by itself (LLaVA-1.5, PaliGemma) the sequence stays short, and the language model
gets only what is left. Projectors that need the whole grid (tiles, shuffles, pooling) get it back: a token that was
dropped with the state in which it left, a merged one as a copy of what it became; they save time in the tower alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.backbones.families import Family
from lit_reduce.backbones.layouts import AnySize, Units
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call, now
from lit_reduce.runtime.signals import ATTENTION, Signal, read
from lit_reduce.runtime.taps import Call, Tap
from lit_reduce.tokens import Budget, Reduction, VisualTokens

_NAME = "_lit_reduce_tower"
POINTS = ("before", "attention")


@dataclass(frozen=True)
class State:
    """What is left of N patches in the middle of the tower; T images (tiles), C channels.

    Attributes:
        anchors: ``[T, n]``, which patches the n tokens are, ascending.
        owner: ``[T, N]``, the token that each patch went into, -1 for none.
        bank: ``[T, N, C]``, the last state of patches that are gone; C is 0 where nobody wants them back.
        size: ``[T, n]``, patches that each token stands for, or None while all stand for themselves.
        stages: How many tokens stay, by block.
    """

    anchors: Tensor
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
        anchors, into = reduction.anchors, reduction.assignment
        if into is None:
            places = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
            into = torch.full_like(self.anchors, -1).scatter(1, anchors, places)
        owner = torch.where(self.owner >= 0, into.gather(1, self.owner.clamp(min=0)), -1)
        size = reduction.size if self.size is None or reduction.size is not None else self.size.gather(1, anchors)
        return State(self.anchors.gather(1, anchors), owner, self.full(x), size, self.stages)

    def full(self, x: Tensor) -> Tensor:
        """All patches ``[T, N, C]`` from the tokens that are left."""
        copies = x.gather(1, self.owner.clamp(min=0)[..., None].expand_as(self.bank))
        return torch.where((self.owner >= 0)[..., None], copies, self.bank)


class InTower:
    """A reducer inside the vision tower of a model, until `remove`.

    Attributes:
        state: What the last pass left; None when it kept all.
        short: Whether the features stay short after the tower.
    """

    def __init__(self, model: Any, family: Family, reducer: Reducer, keep: Budget) -> None:
        self.model, self.reducer, self.keep = model, reducer, keep
        self.tower, self.short = tower_of(model), family.tokenwise
        self.point = getattr(reducer, "point", "before")
        self.signals = {text: Signal.parse(text) for text in reducer.signals}
        self._check(family)
        self.state: State | None = None
        self._spent = 0.0
        self._seen: dict[str, Tensor] = {}
        self._before: list[tuple[nn.Module, Any]] = []
        for number, block in enumerate(self.tower.blocks[: self.tower.depth]):
            self._replace(block, partial(self._block, number))
            self._replace(self.tower.attention(number), self._attention)
        for number in range(self.tower.depth, len(self.tower.blocks)):  # behind the one that feeds the projector
            self._replace(self.tower.attention(number), self._attention)
        vars(model)[_NAME] = self

    def _check(self, family: Family) -> None:
        name = self.reducer.name
        if any(isinstance(layout, AnySize | Units) for layout in family.layouts.values()) or (
            "pixtral" in type(self.model.get_encoder("image")).__name__.lower()
        ):
            raise UserError(
                f"'{name}' acts inside the vision tower, but that of '{family.name}' puts all images into one row, "
                "which is not supported; use a reducer at the projector"
            )
        if not isinstance(getattr(self.model.config, "vision_feature_layer", -1), int):
            raise UserError(f"'{name}' acts inside the vision tower, but this model reads several of its blocks")
        if self.point not in POINTS:
            raise UserError(f"'{name}' acts at the point '{self.point}'; known: {', '.join(POINTS)}")
        for text, signal in self.signals.items():
            if signal.name not in ATTENTION | {"size"} or signal.layer is not None:
                raise UserError(
                    f"'{name}' wants the signal '{text}' inside the vision tower; there are "
                    f"{', '.join(sorted(ATTENTION | {'size'}))} of the attention just before"
                )

    def time(self) -> float:
        """Milliseconds that the reducer took since this was asked last."""
        spent, self._spent = self._spent, 0.0
        return spent

    def remove(self) -> None:
        """Give the blocks their own methods back; harmless when repeated."""
        while self._before:
            module, forward = self._before.pop()
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        if vars(self.model).get(_NAME) is self:
            del vars(self.model)[_NAME]

    def _replace(self, module: nn.Module, method: Any) -> None:
        before = vars(module).get("forward")
        self._before.append((module, before))
        plain = before or MethodType(type(module).forward, module)
        vars(module)["forward"] = partial(method, plain)

    def _block(self, number: int, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One block of the tower, with what the reducer does before it or in its middle."""
        if number == 0:
            self.state = None
            patches = hidden.shape[1] - self.tower.prefix
            left = self.reducer.stages(self.tower.depth, patches, self.keep.count(patches))
            if any(count < patches for count in left.values()):
                patch_states = hidden[:, self.tower.prefix :]
                self.state = State.whole(patch_states[..., :0] if self.short else patch_states, left)
        if self.state is None:
            return plain(hidden, *args, **kwargs)
        count = self.state.stages.get(number, self.state.anchors.shape[1])
        fewer = count < self.state.anchors.shape[1]
        if fewer and self.point == "before":
            hidden = self._reduce(hidden, count)
        if fewer and self.point == "attention":
            with _without(self.tower.mlp(number), attention=False), self._reading(number, number):
                hidden = plain(hidden, *args, **kwargs)
            hidden = self._reduce(hidden, count)
            with _without(self.tower.attention(number), attention=True):
                hidden = plain(hidden, *args, **kwargs)
        else:
            with self._reading(number, number + 1 if self.point == "before" else -1):
                hidden = plain(hidden, *args, **kwargs)
        if number == self.tower.feature and not self.short:
            hidden = torch.cat([hidden[:, : self.tower.prefix], self.state.full(hidden[:, self.tower.prefix :])], 1)
            self.state = None
        return hidden

    @contextmanager
    def _reading(self, number: int, stage: int) -> Iterator[None]:
        """While it lasts, a block's attention is read for the stage, if there is one and anything is asked."""
        names = {signal.name for signal in self.signals.values()} & ATTENTION
        assert self.state is not None
        with ExitStack() as stack:
            if names and stage in self.state.stages:
                stack.enter_context(Tap(self.tower.attention(number), partial(self._see, names)))
            yield

    def _see(self, names: set[str], seen: Call) -> None:
        self._seen = read(seen, names, self.tower.prefix)

    def _reduce(self, hidden: Tensor, count: int) -> Tensor:
        """Fewer tokens, the prefix untouched."""
        assert self.state is not None
        start, state = now(hidden), self.state
        prefix, x = hidden.split([self.tower.prefix, hidden.shape[1] - self.tower.prefix], 1)
        side = isqrt(x.shape[1])
        grid = (1, side, side) if side**2 == x.shape[1] else (1, 1, x.shape[1])
        tokens = VisualTokens(x, grid, {text: self._signal(signal.name, x) for text, signal in self.signals.items()})
        reduction = call(self.reducer, tokens, count)
        if reduction.valid is not None and not bool(reduction.valid.all()):
            raise UserError(f"'{self.reducer.name}' keeps another count of each image, which no vision tower can do")
        new = reduction.gather(tokens).to(x.dtype)
        self.state = state.after(reduction, x)
        self._spent += 1000 * (now(hidden) - start)
        return torch.cat([prefix, new], 1)

    def _signal(self, name: str, x: Tensor) -> Tensor:
        if name == "size":
            size = self.state.size if self.state is not None else None
            return x.new_ones(x.shape[:2]) if size is None else size
        if name not in self._seen:
            raise UserError(f"'{self.reducer.name}' acts before the first block, where no attention was seen yet")
        found = self._seen[name]
        return found.mean(1) if name == "cls_query" else found[..., 0] if name in ("cls", "received") else found

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
        first = torch.arange(prefix, device=state.anchors.device).expand(len(state.anchors), -1)
        index = torch.cat([first, state.anchors + prefix], 1)
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


@contextmanager
def _without(module: nn.Module, *, attention: bool) -> Iterator[None]:
    """While it lasts, a part of a block adds nothing; so one block runs as two halves, by its own code."""
    before = vars(module).get("forward")
    vars(module)["forward"] = partial(_nothing, attention)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _nothing(attention: bool, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    zeros = torch.zeros_like(hidden_states)
    return (zeros, None) if attention else zeros


def install(model: Any, family: Family, reducer: Reducer, keep: Budget) -> InTower:
    """Put a reducer into the vision tower.

    Args:
        model: The backbone.
        family: Its family.
        reducer: Of site ``encoder``; ``reducer.point`` says whether it acts before a block, or between its attention
            and its MLP.
        keep: Tower tokens that stay of each image, or of each tile where images are cut into tiles.

    Returns:
        A handle whose ``remove`` gives the tower back as it was.

    Raises:
        UserError: a tower, a point or a signal that cannot be served.
    """
    return InTower(model, family, reducer, keep)


def installed(model: Any) -> InTower | None:
    """The reducer inside a model's tower, if there is one."""
    found: InTower | None = vars(model).get(_NAME)
    return found
