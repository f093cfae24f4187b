"""What reducers inside any vision tower share: checks, a place on the model, which patches each block still had."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.backbones.layouts import Inputs, Layout
from lit_reduce.backbones.towers import Tower, tower_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.attention.probe import AttentionProbe, Call
from lit_reduce.runtime.attention.signals import ATTENTION, Signal, read
from lit_reduce.tokens import Budget

_NAME = "_lit_reduce_tower"
POINTS = ("before", "attention")


class TowerHooks:
    """A reducer inside the vision tower of a model, until `remove`.

    Attributes:
        short: Whether the features stay short after the tower.
        reads: For each block that worked on fewer patches than there are, which ones its attention saw.
        leaves: And which ones its output holds.
    """

    short = False

    def __init__(self, model: Any, reducer: Reducer, keep: Budget) -> None:
        self.model, self.reducer, self.keep = model, reducer, keep
        self.tower: Tower = tower_of(model)
        self.point = getattr(reducer, "point", "before")
        self.signals = {text: Signal.parse(text) for text in reducer.signals}
        self.reads: dict[int, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self._spent = 0.0
        self._seen: dict[str, list[Tensor]] = {}
        self._before: list[tuple[nn.Module, Any]] = []
        self._check()
        vars(model)[_NAME] = self

    def _check(self) -> None:
        name = self.reducer.name
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

    def left(self, layout: Layout, inputs: Inputs, counts: list[int]) -> list[Tensor]:  # noqa: ARG002  (others do)
        """The original indices of the visual tokens of each picture that the last pass left; empty where it left all.

        Args:
            layout: How the tower's tokens become visual tokens.
            inputs: The model's inputs.
            counts: Visual tokens of each picture.
        """
        return []

    def sizes(self) -> list[Tensor] | None:
        """Patches ``[k]`` that each feature of a picture stands for; None where each is one patch."""
        return None

    def whole(self, text: str, block: int, x: Tensor, output: bool) -> Tensor:
        """Rows of all patches from what was seen at one block, for a reducer behind this one.

        Args:
            text: The signal.
            block: Where it was read.
            x: ``[T, n, C]``.
            output: Whether it is the block's output, and not its attention.

        Raises:
            UserError: that block no longer had them all, and those that are gone have no value there.
        """
        fewer = self.leaves if output else self.reads
        if block in fewer:
            last = min(fewer) - 1
            name = Signal.parse(text).name
            instead = f"ask for {name}@{last} or earlier" if last >= 0 else "attach only one of the two reducers"
            raise UserError(
                f"the signal '{text}' is read in block {block} of the vision tower, where '{self.reducer.name}' has "
                f"dropped patches already; {instead}"
            )
        return x

    def _replace(self, module: nn.Module, method: Any) -> None:
        before = vars(module).get("forward")
        self._before.append((module, before))
        plain = before or MethodType(type(module).forward, module)
        vars(module)["forward"] = partial(method, plain)

    @contextmanager
    def _reading(self, number: int, wanted: bool) -> Iterator[None]:
        """While it lasts, a block's attention is read, where that is wanted and anything is asked."""
        names = {signal.name for signal in self.signals.values()} & ATTENTION
        with ExitStack() as stack:
            if names and wanted:
                self._seen = {}
                stack.enter_context(AttentionProbe(self.tower.attention(number), partial(self._see, names)))
            yield

    def _see(self, names: set[str], seen: Call) -> None:
        for name, x in read(seen, names, self.tower.prefix).items():
            self._seen.setdefault(name, []).append(x)

    def _read(self, name: str) -> Tensor:
        """``[T, n, C]`` of the attention read last; towers that pack their images make one call a segment."""
        if name not in self._seen:
            raise UserError(f"'{self.reducer.name}' acts before the first block, where no attention was seen yet")
        return torch.cat(self._seen[name], 1)

    def _run(self, number: int, plain: Any, hidden: Tensor, reduce: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A block with a reduction between its attention and its MLP: two halves, the other half adding nothing."""
        with _without(self.tower.mlp(number)), self._reading(number, True):
            hidden = plain(hidden, *args, **kwargs)
        hidden = reduce(hidden)
        pair = hidden.ndim == 3  # attention modules of towers without a batch dimension return no weights beside
        with _without(self.tower.attention(number), pair):
            out: Tensor = plain(hidden, *args, **kwargs)
        return out


def installed(model: Any) -> TowerHooks | None:
    """The reducer inside a model's tower, if there is one."""
    found: TowerHooks | None = vars(model).get(_NAME)
    return found


def as_token(name: str, x: Tensor) -> Tensor:
    """The signal of a picture from what its patches ``[T, n, C]`` showed: a number a token, or one query for all."""
    return x.mean(1) if name == "cls_query" else x[..., 0] if name in ("cls", "received") else x


@contextmanager
def _without(module: nn.Module, pair: bool = False) -> Iterator[None]:
    """While it lasts, a part of a block adds nothing; so one block runs as two halves, by its own code."""
    before = vars(module).get("forward")
    vars(module)["forward"] = partial(_nothing, pair)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _nothing(pair: bool, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    zeros = torch.zeros_like(hidden_states)
    return (zeros, None) if pair else zeros
