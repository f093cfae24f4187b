"""FLOPs and times up to the first token, of several reducers and budgets on the same prompt."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.flops import price
from lit_reduce.benchmark.latency import alternate, spread
from lit_reduce.benchmark.phase_timer import Phases, PhaseTimer
from lit_reduce.benchmark.profiling import ModuleFlops
from lit_reduce.errors import one_line
from lit_reduce.inference.spec import ReducerSpec, visual_counts
from lit_reduce.runtime import attach
from lit_reduce.tokens import Budget

Key = TypeVar("Key", bound=Hashable)


def timed_generate(
    backbone: Backbone, inputs: Mapping[str, Any], spec: ReducerSpec, new_tokens: int, clock: str = "wall"
) -> tuple[Phases, int | None]:
    """The phases of one ``generate``, and the visual tokens of a prompt that stayed; None for all."""
    model, used = backbone.model, None
    with ExitStack() as stack:
        if spec.reducer is not None:
            used = stack.enter_context(attach(model, spec.reducer, spec.keep, spec.positions))
        timer = stack.enter_context(PhaseTimer(model, spec.reducer, clock))
        model.generate(**inputs, streamer=timer, do_sample=False, max_new_tokens=new_tokens)
    return timer.phases(), None if used is None else used.stats.kept // len(inputs["input_ids"])


@torch.inference_mode()
def measure_costs(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    specs: Mapping[Key, ReducerSpec],
    runs: int,
    clock: str = "wall",
    on_run: Callable[[], object] = lambda: None,
) -> dict[Key, dict[str, Any]]:
    """Count and time each spec; all timed runs take turns, after one run of each to warm up.

    Args:
        backbone: The model.
        inputs: One prompt, as ``backbone.prepare`` returned it.
        specs: What to measure.
        runs: Timed runs of each; with 0 only FLOPs are counted.
        clock: One of :data:`lit_reduce.benchmark.phase_timer.CLOCKS`.
        on_run: Called after each timed run.

    Returns:
        For each spec ``flops`` and, as median and quartiles, ``first_token_ms``, ``prefill_ms`` and ``reducer_ms``;
        or the reason as ``cost_error`` where it cannot be run or priced.
    """
    total = visual_counts(backbone, inputs)[0]

    def once(spec: ReducerSpec) -> Phases:
        phases, _ = timed_generate(backbone, inputs, spec, 1, clock)
        on_run()
        return phases

    costs: dict[Key, dict[str, Any]] = {}
    for key, spec in specs.items():
        try:
            with ModuleFlops(spec.reducer) as counted:
                _, kept = timed_generate(backbone, inputs, spec, 1)
            budget = None if spec.reducer is None else Budget.parse(spec.keep).count(total)
            cost = price(backbone.model, inputs, spec.reducer, budget, kept, counted.total)
            costs[key] = {"flops": asdict(cost) | {"first_token": cost.first_token}}
        except Exception as error:  # noqa: BLE001  one spec that fails must not stop the others
            costs[key] = {"cost_error": one_line(error)}
    timed = alternate({key: partial(once, specs[key]) for key, cost in costs.items() if "flops" in cost}, runs)
    for key, phases in timed.items():
        for phase in ("first_token", "prefill", "reducer") if phases else ():
            costs[key][f"{phase}_ms"] = spread([getattr(each, phase) for each in phases])._asdict()
    return costs
