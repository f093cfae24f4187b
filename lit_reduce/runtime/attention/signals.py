"""Names of signals, and how each is read from one block of a vision tower."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reduce.backbones.families import Family
from lit_reduce.backbones.layouts import Inputs, Layout
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.runtime.attention.probe import CLS, AttentionCall, AttentionProbe

ATTENTION = frozenset({"cls", "received", "keys", "queries", "values", "cls_query"})  # read from one attention call
TOWER = ATTENTION | {"encoder"}
Whole = Callable[[str, int, Tensor, bool], Tensor]


class Signal(NamedTuple):
    """A declared signal ``name`` or ``name@layer``.

    Attributes:
        name: What.
        layer: Where: an index (negative from the end), a fraction of the depth, or None for the natural place.
    """

    name: str
    layer: int | float | None = None

    @classmethod
    def parse(cls, text: str) -> "Signal":
        """Read ``keys``, ``keys@-2`` or ``keys@0.5``.

        Raises:
            UserError: what stands behind the @ is no layer.
        """
        name, at, layer = text.partition("@")
        if not at:
            return cls(name)
        if not re.fullmatch(r"-?\d+|0?\.\d+|[01]\.0*", layer):
            raise UserError(f"the signal '{text}' names no layer: write {name}@3, {name}@-2 or {name}@0.5")
        return cls(name, float(layer) if "." in layer else int(layer))

    def at(self, depth: int, natural: int) -> int:
        """The layer among ``depth`` ones.

        Raises:
            UserError: there is no such layer.
        """
        if self.layer is None:
            return natural
        if isinstance(self.layer, float):
            return min(depth - 1, int(self.layer * depth))
        if not -depth <= self.layer < depth:
            raise UserError(f"the signal '{self.name}@{self.layer}' is outside of the {depth} layers here")
        return self.layer % depth


def read(call: AttentionCall, names: Iterable[str], prefix: int) -> dict[str, Tensor]:
    """What a tower's attention shows of its patches in one call, each ``[B, N, C]``.

    Towers without CLS give ``received`` as ``cls``, and every patch's own query (the mean is yet to be taken) as
    ``cls_query``. Queries and keys are those that meet, with rotary embedding and norms; heads are concatenated.

    Args:
        call: The attention call.
        names: Some of `ATTENTION`.
        prefix: Tokens before the patches; the first of them is CLS.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "received" or (name == "cls" and not prefix):
            found[name] = call.received()[:, prefix:, None]
        elif name == "cls":
            found[name] = call.rows(CLS).mean(1)[:, 0, prefix:, None]
        elif name == "cls_query" and prefix:
            found[name] = _flat(call.q[:, :, :1]).expand(-1, call.q.shape[2] - prefix, -1)
        else:
            which = {"keys": call.k, "queries": call.q, "values": call.v, "cls_query": call.q}[name]
            found[name] = _flat(which[:, :, prefix:])
    return found


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class SignalRecorder:
    """Probes and hooks on a vision tower for some signals, while the ``with`` block lasts."""

    def __init__(self, model: Any, family: Family, asked: Mapping[str, Signal]) -> None:
        self.model = model
        self.asked = {text: signal for text, signal in asked.items() if signal.name in TOWER}
        self.stack, self.seen = ExitStack(), dict[str, Tensor]()
        self.calls: dict[int, list[dict[str, Tensor]]] = {}
        self.blocks: dict[str, int] = {}
        if not self.asked:
            return
        self.tower, self.entry = tower_of(model), family.projector(model)
        natural, depth = self.tower.feature, len(self.tower.blocks)
        self.blocks = {text: signal.at(depth, natural) for text, signal in self.asked.items()}

    def __enter__(self) -> "SignalRecorder":
        for text, signal in self.asked.items():
            if signal.name == "encoder" and signal.layer is None:
                self._hook(self.entry.register_forward_pre_hook(partial(self._keep, text)))
            elif signal.name == "encoder":
                block = self.tower.blocks[self.blocks[text]]
                self._hook(block.register_forward_hook(partial(self._keep, text)))
        wanted: dict[int, set[str]] = {}
        for text, signal in self.asked.items():
            if signal.name in ATTENTION:
                wanted.setdefault(self.blocks[text], set()).add(signal.name)
        for number, names in wanted.items():
            probe = AttentionProbe(self.tower.attention(number), partial(read, names=names, prefix=self.tower.prefix))
            self.calls[number] = self.stack.enter_context(probe).rows
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _hook(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def _keep(self, text: str, _: Any, *seen: Any) -> None:
        x = seen[-1]  # the arguments of a pre-hook, or the output of a hook
        self.seen[text] = x[0] if isinstance(x, tuple) else x

    def read(
        self, layout: Layout, inputs: Inputs, counts: list[int], whole: Whole | None = None
    ) -> dict[str, list[Tensor]]:
        """One tensor a picture for each signal: ``[n_i]`` (attention), ``[C]`` (``cls_query``) or ``[n_i, C]``.

        Args:
            layout: How tower tokens become visual tokens.
            inputs: The model's inputs.
            counts: Visual tokens of each picture.
            whole: Called with the signal's name, its block, what was read there, and whether that is the block's
                output, where a reducer inside the tower may have left a block fewer patches.
        """
        return {text: self._arranged(text, layout, inputs, counts, whole) for text in self.asked}

    def _arranged(
        self, text: str, layout: Layout, inputs: Inputs, counts: list[int], whole: Whole | None
    ) -> list[Tensor]:
        name = self.asked[text].name
        # Towers that pack their images into one row make one call a segment.
        x = self.seen[text] if name == "encoder" else torch.cat([c[name] for c in self.calls[self.blocks[text]]], 1)
        x = x[None] if x.ndim == 2 else x
        if whole is not None and not (name == "encoder" and self.asked[text].layer is None):
            x = whole(text, self.blocks[text], x, name == "encoder")
        rows = layout.arrange(self.model, inputs, x).split(counts)
        if name == "cls_query":  # newline tokens, which have no query, must not thin out the mean
            shares = layout.arrange(self.model, inputs, torch.ones_like(x[..., :1])).split(counts)
            return [row.sum(0) / share.sum(0) for row, share in zip(rows, shares, strict=True)]
        return [row[:, 0] if name in ("cls", "received") else row for row in rows]
