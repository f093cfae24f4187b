"""What a reducer saves and costs, counted and measured against the same backbone without it."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.costs import timed_generate
from lit_reduce.benchmark.flops import Cost, price
from lit_reduce.benchmark.latency import alternate, spread
from lit_reduce.benchmark.phase_timer import Phases
from lit_reduce.benchmark.profiling import ModuleFlops, peak_bytes
from lit_reduce.benchmark.workload import pictures_given, workload
from lit_reduce.errors import UserError
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.plugin import create_for
from lit_reduce.reducer import Reducer, available
from lit_reduce.runtime.handlers import shares_encoding, tower_signals
from lit_reduce.settings import ReducerSettings
from lit_reduce.settings.bench import BenchSettings
from lit_reduce.tokens import Budget

PLAIN = "all"


def named_spec(settings: ReducerSettings, backbone: Backbone) -> ReducerSpec:
    """The spec for a name; a reducer that needs training gets random weights, since its time does not depend on them.

    Raises:
        UserError: options that do not fit.
    """
    cls = available()[settings.name]
    if not cls.trained:
        return find_spec(settings, 1.0)
    torch.manual_seed(0)
    return ReducerSpec(create_for(backbone.identity, settings.name, settings.options).eval())


@torch.inference_mode()
def bench(
    backbone: Backbone,
    spec: ReducerSpec,
    keeps: Sequence[int | float],
    batch: int,
    settings: BenchSettings,
    on_run: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of the report for one batch size: the plain backbone, then every budget."""
    model, reducer = backbone.model, spec.reducer
    inputs = workload(backbone, batch, settings.visual, settings.text)
    visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    budgets = {str(keep): Budget.parse(keep).count(visual) for keep in keeps if reducer is not None}

    def once(keep: int | None) -> Phases:
        at = ReducerSpec() if keep is None else replace(spec, keep=keep)
        phases, kept = timed_generate(backbone, inputs, at, settings.new_tokens, settings.clock)
        remaining[keep] = visual if kept is None else kept
        on_run()
        return phases

    remaining: dict[int | None, int] = {}
    counted: dict[int | None, int] = {}
    later: dict[int | None, int] = {}  # FLOPs of the reducer at each token after the first
    peaks: dict[int | None, int] = {}
    with ExitStack() as stack:
        if not settings.tower:
            if reducer is not None and looks_into_tower(reducer):
                raise UserError(f"tower=false: the reducer '{reducer.name}' looks into the tower; leave it on")
            stack.enter_context(pictures_given(backbone, inputs))
        asked: dict[str, int | None] = {PLAIN: None, **budgets}
        for keep in asked.values():  # the uncounted runs, which warm up as well
            with ModuleFlops(reducer, model) as flops:
                peaks[keep] = peak_bytes(partial(once, keep), model.device)
            counted[keep], later[keep] = flops.total, flops.later // max(1, settings.new_tokens - 1)
        times = alternate({name: partial(once, keep) for name, keep in asked.items()}, settings.runs)
    shapes = {k: v for k, v in inputs.items() if settings.tower or k in ("input_ids", "attention_mask")}
    whole = price(model, shapes)
    rows = []
    for name, keep in asked.items():
        at = None if keep is None else reducer
        cost = price(model, shapes, at, keep, remaining[keep], counted[keep])
        cost = replace(cost, decode=cost.decode + later[keep])
        rows.append({"batch": batch, "keep": name, "tokens": remaining[keep] if keep is None else keep})
        rows[-1] |= _row(cost, whole, times[name], times[PLAIN]) | {"peak_bytes": peaks[keep]}
    return rows


def looks_into_tower(reducer: Reducer) -> bool:
    """Whether a reducer needs more of the tower than its projected features."""
    return not shares_encoding(reducer) or bool(tower_signals(reducer) - {"text"})


def _row(cost: Cost, whole: Cost, times: list[Phases], plain: list[Phases]) -> dict[str, Any]:
    """What was counted and measured for one budget, and how it compares with the plain backbone in the same turns."""
    entry: dict[str, Any] = {"flops": {k: v for k, v in asdict(cost).items() if k != "kv_bytes"}}
    entry["kv_bytes"] = cost.kv_bytes
    for name in ("first_token", "prefill", "decode", "reducer"):
        entry[f"{name}_ms"] = spread([getattr(phases, name) for phases in times])._asdict()
    entry["prefill_flop_ratio"] = whole.prefill / cost.prefill
    for name in ("first_token", "prefill"):
        ratios = [getattr(a, name) / getattr(b, name) for a, b in zip(plain, times, strict=True)]
        entry[f"{name}_speedup"] = spread(ratios)._asdict()
    entry["reducer_share"] = statistics.median(b.reducer / a.prefill for a, b in zip(plain, times, strict=True))
    return entry
