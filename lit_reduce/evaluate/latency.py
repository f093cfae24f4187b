"""Time to the first token, with and without a reducer, measured so that the two can be compared."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.evaluate.plan import Plan, generate


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one plan over several runs.

    Attributes:
        median: Median time to the first token; encoding, the reducer and prefill are all inside.
        low: Lower quartile.
        high: Upper quartile.
        reducer_ms: Median time of the reducer alone; None for all tokens.
        runs: How many runs were counted.
    """

    median: float
    low: float
    high: float
    reducer_ms: float | None
    runs: int


def first_token(
    backbone: Backbone, inputs: Mapping[str, Any], plans: Mapping[str, Plan], runs: int = 5
) -> dict[str, Timing]:
    """Measure each plan on the same inputs; runs take turns, so that a slow moment of the machine hits all alike.

    Decoding the picture file and the processor's resizing are outside: they are the same for every plan.

    Args:
        backbone: The model.
        inputs: What ``backbone.prepare`` gave, for one prompt or a batch.
        plans: What to compare, by name.
        runs: Counted runs of each plan, after one uncounted run to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in plans}
    own: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(runs + 1):
        for name, plan in plans.items():
            elapsed, reducer_ms = _run(backbone, inputs, plan)
            if turn:
                times[name].append(elapsed)
                if reducer_ms is not None:
                    own[name].append(reducer_ms)
    return {name: _timing(times[name], own[name]) for name in plans}


def _timing(times: list[float], own: list[float]) -> Timing:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    reducer_ms = statistics.median(own) if own else None
    return Timing(quartiles[1], quartiles[0], quartiles[2], reducer_ms, len(times))


def _run(backbone: Backbone, inputs: Mapping[str, Any], plan: Plan) -> tuple[float, float | None]:
    device = backbone.model.device
    _wait(device)
    start = time.perf_counter()
    _, logical = generate(backbone, inputs, plan, max_new_tokens=1)
    _wait(device)
    return 1000 * (time.perf_counter() - start), None if logical is None else logical.reducer_ms


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
