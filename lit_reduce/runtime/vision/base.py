"""Base class of the hooks that run a reducer inside a vision tower."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.backbones.layouts import Inputs, Layout
from lit_reduce.backbones.towers import Tower, tower_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.attention.probe import AttentionCall, AttentionProbe
from lit_reduce.runtime.attention.signals import ATTENTION, Signal, read
from lit_reduce.runtime.patches import ModelHooks, Patches
from lit_reduce.tokens import Budget

_NAME = "_lit_reduce_tower"
POINTS = ("before", "attention")


class TowerHooks(ModelHooks):
    """Runs a reducer inside the vision tower of a model, from `install` until `remove`.

    Attributes:
        short: Whether the features stay short after the tower.
        owners: See `Registers`; empty for all other reducers.
        reads: For each block that worked on fewer patches than there are, which ones its attention saw.
        leaves: And which ones its output holds.
    """

    short = False

    def __init__(self, model: Any, reducer: Reducer, keep: Budget) -> None:
        super().__init__()
        self.model, self.reducer, self.keep = model, reducer, keep
        self.tower: Tower = tower_of(model)
        self.point = getattr(reducer, "point", "before")
        self.signals = {text: Signal.parse(text) for text in reducer.signals}
        self.reads: dict[int, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self.owners: list[Tensor] = []
        self._elapsed_ms = 0.0
        self._seen: dict[str, list[Tensor]] = {}
        self._check()

    def _patch(self, patches: Patches) -> None:
        patches.set(self.model, _NAME, self)

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

    def take_elapsed_ms(self) -> float:
        """Milliseconds that the reducer took since the last call of this method."""
        elapsed, self._elapsed_ms = self._elapsed_ms, 0.0
        return elapsed

    def prepare(self, layout: Layout, inputs: Inputs) -> None:
        """Called before each pass of the tower.

        Args:
            layout: How the tower's tokens become visual tokens.
            inputs: The model's inputs.
        """

    def left(self, layout: Layout, inputs: Inputs, counts: list[int]) -> list[Tensor]:  # noqa: ARG002  (others do)
        """Original indices of the visual tokens of each image that the last pass kept; empty where it kept all.

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

    @contextmanager
    def _reading(self, number: int, wanted: bool) -> Iterator[None]:
        """Read a block's attention within the block, where that is wanted and the reducer declares such signals."""
        names = {signal.name for signal in self.signals.values()} & ATTENTION
        with ExitStack() as stack:
            if names and wanted:
                self._seen = {}
                stack.enter_context(AttentionProbe(self.tower.attention(number), partial(self._see, names)))
            yield

    def _see(self, names: set[str], seen: AttentionCall) -> None:
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
    """The signal of an image from the values ``[T, n, C]`` of its patches: a number a token, or one query for all."""
    return x.mean(1) if name == "cls_query" else x[..., 0] if name in ("cls", "received") else x


@contextmanager
def _without(module: nn.Module, pair: bool = False) -> Iterator[None]:
    """Let a part of a block add nothing within the ``with`` block; so one block runs as two halves, by its own code."""
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
