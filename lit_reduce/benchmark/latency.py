"""Measuring times so that they can be compared: runs in turns, a warm-up, median and quartiles."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.inference.spec import ReducerSpec, generate

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Spread(NamedTuple):
    """Median and quartiles of several values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return Spread(median, low, high)


def alternate(runs: Mapping[Key, Callable[[], T]], turns: int) -> dict[Key, list[T]]:
    """Call each of ``runs`` once in every turn, so that a slow moment of the machine hits all alike.

    Returns:
        What each returned, by turn: entry ``i`` of all names belongs to the same moment.
    """
    results: dict[Key, list[T]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            results[name].append(run())
    return results


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one reducer at one budget over several runs.

    Attributes:
        first_token: Time to the first token; encoding, the reducer and prefill are all inside.
        reducer: Time of the reducer alone; None for all tokens.
        runs: How many runs were counted.
    """

    first_token: Spread
    reducer: Spread | None
    runs: int


def first_token(
    backbone: Backbone, inputs: Mapping[str, Any], specs: Mapping[str, ReducerSpec], runs: int = 5
) -> dict[str, Timing]:
    """Measure each spec on the same inputs, in turns.

    Decoding the picture file and the processor's resizing are outside: they are the same for every spec.

    Args:
        backbone: The model.
        inputs: What ``backbone.prepare`` gave, for one prompt or a batch.
        specs: What to compare, by name.
        runs: Counted runs of each spec, after one uncounted run to warm up.
    """
    found = alternate({name: partial(_run, backbone, inputs, spec) for name, spec in specs.items()}, runs + 1)
    return {name: _timing(values[1:]) for name, values in found.items()}


def _timing(values: list[tuple[float, float | None]]) -> Timing:
    own = [reducer_ms for _, reducer_ms in values if reducer_ms is not None]
    return Timing(spread([elapsed for elapsed, _ in values]), spread(own) if own else None, len(values))


def _run(backbone: Backbone, inputs: Mapping[str, Any], spec: ReducerSpec) -> tuple[float, float | None]:
    device = backbone.model.device
    wait(device)
    start = time.perf_counter()
    _, prompt_map = generate(backbone, inputs, spec, max_new_tokens=1)
    wait(device)
    return 1000 * (time.perf_counter() - start), None if prompt_map is None else prompt_map.reducer_ms


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
