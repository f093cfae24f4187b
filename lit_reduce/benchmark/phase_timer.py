"""Times the phases of one ordinary ``generate`` by hooks and a streamer; no phase is run on its own.

The first token is there when ``generate`` hands it to its streamer. Prefill is the first call of the model: everything
between the encoded pictures and the logits of the last position, masks and cache included. The reducer's time is that
of its own calls, wherever in the model they happen.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.benchmark.latency import wait

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Stamp = Any  # seconds of the clock on the CPU, events on a GPU, so that nothing waits in the middle


@dataclass(frozen=True)
class Phases:
    """Milliseconds of one call of ``generate`` on a batch.

    Attributes:
        first_token: From the call to the first token: tower, projector, reducer, prefill.
        prefill: The language model over the prompt, with whatever a reducer does inside it.
        decode: Each further token, on average; 0 when only one was made.
        reducer: Its calls up to the end of prefill; where layers look back at later tokens too, that is in decode.
    """

    first_token: float
    prefill: float
    decode: float
    reducer: float


class PhaseTimer:
    """A context manager around one call of ``generate``, to which it is given as ``streamer``."""

    def __init__(self, model: Any, reducer: nn.Module | None = None, clock: str = "wall") -> None:
        """Prepare to watch ``model`` and, where there is one, the reducer attached to it, by one of `CLOCKS`."""
        self.model, self.reducer, self.device, self.clock = model, reducer, model.device, CLOCKS[clock]
        self.calls: list[Stamp] = []
        self.own: list[Stamp] = []
        self.marks: list[int] = []  # stamps of the reducer when each call of the model began
        self.tokens: list[Stamp] = []

    def __enter__(self) -> "PhaseTimer":
        # First before and last after, so that hooks of an attached reducer are inside.
        watched: list[tuple[Any, list[Stamp]]] = [(self.model, self.calls)]
        watched += [] if self.reducer is None else [(self.reducer, self.own)]
        self.handles = []
        for module, stamps in watched:
            self.handles += [
                module.register_forward_pre_hook(lambda *_, to=stamps: to.append(self._now()), prepend=True),
                module.register_forward_hook(lambda *_, to=stamps: to.append(self._now()), always_call=True),
            ]
        mark = self.model.register_forward_pre_hook(lambda *_: self.marks.append(len(self.own)), prepend=True)
        self.handles.append(mark)
        wait(self.device)
        self.start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def put(self, _: Tensor) -> None:
        """Called by ``generate`` with the prompt, and then with every token."""
        self.tokens.append(self._now())

    def end(self) -> None:
        """Called by ``generate`` after the last token."""

    def phases(self) -> Phases:
        """The measured phases, after the block has ended."""
        wait(self.device)
        _, first, *more = self.tokens
        decode = self._between(first, more[-1]) / len(more) if more else 0.0
        mine = self.own[: self.marks[1] if len(self.marks) > 1 else None]
        own = sum(self._between(a, b) for a, b in zip(mine[::2], mine[1::2], strict=True))
        return Phases(self._between(self.start, first), self._between(*self.calls[:2]), decode, own)

    def _now(self) -> Stamp:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Stamp, end: Stamp) -> float:
        return float(start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start))
