"""``lit-reduce bench``: what a reducer saves and costs, counted and measured against the same backbone without it."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_reduce import settings
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.benchmark.bench_table import about, table
from lit_reduce.benchmark.flops import Cost, price
from lit_reduce.benchmark.latency import alternate, spread
from lit_reduce.benchmark.phase_timer import CLOCKS, Phases, PhaseTimer
from lit_reduce.benchmark.profiling import ModuleFlops, peak_bytes
from lit_reduce.benchmark.workload import pictures_given, workload
from lit_reduce.errors import UserError
from lit_reduce.files import check_writable, write_atomic
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.plugin import check_backbone, create_for
from lit_reduce.reducer import Reducer, available
from lit_reduce.runtime import attach
from lit_reduce.runtime.handlers import shares_encoding, tower_signals
from lit_reduce.settings import BackboneSettings, ReducerSettings
from lit_reduce.tokens import Budget

PLAIN = "all"


@dataclass
class BenchSettings:
    """Settings of ``bench``; ``configs/bench.yaml`` explains each."""

    backbone: BackboneSettings = field(default_factory=lambda: BackboneSettings("shape:smolvlm-256m"))
    reducer: ReducerSettings = field(default_factory=lambda: ReducerSettings("covipal"))
    keep: Any = field(default_factory=lambda: [192, 128, 64])
    batch: Any = field(default_factory=lambda: [1, 4])
    visual: int | None = None
    text: int = 32
    new_tokens: int = 17
    runs: int = 5
    tower: bool = True
    clock: str = "wall"
    out: str = "outputs/bench.json"


def run(chosen: BenchSettings) -> None:
    """Count and measure every budget at every batch size; writes JSON, prints a table.

    Raises:
        UserError: A setting, the backbone or the reducer is not usable.
    """
    for name in ("text", "new_tokens", "runs"):
        if getattr(chosen, name) < 1:
            raise UserError(f"{name}={getattr(chosen, name)}: give 1 or more")
    keeps = [Budget.parse(keep).value for keep in _listed(chosen.keep, "keep")]
    batches = _listed(chosen.batch, "batch")
    for batch in batches:
        if not isinstance(batch, int) or batch < 1:
            raise UserError(f"batch={batch} is not a number of prompts: give whole numbers from 1 on, as batch=[1,4]")
    if chosen.clock not in CLOCKS:
        raise UserError(f"clock={chosen.clock} is not known: use {' or '.join(CLOCKS)}")
    out = Path(chosen.out)
    if out.suffix != ".json":
        raise UserError(f"out={out}: the report is JSON, so give a name that ends in .json")
    check_writable(out)
    early = chosen.reducer.name in available() or find_spec(chosen.reducer, keeps[0])
    backbone = load_backbone(
        chosen.backbone.name, chosen.backbone.dtype, chosen.backbone.device, chosen.backbone.revision
    )
    backbone.model.generation_config.eos_token_id = None  # every run makes as many tokens as it was asked for
    if chosen.clock == "cpu" and backbone.model.device.type != "cpu":
        raise UserError("clock=cpu counts the processor's own time, but the model runs on a GPU; use clock=wall")
    plan = early if isinstance(early, ReducerSpec) else named_spec(chosen.reducer, backbone)
    if plan.trained_for is not None:
        check_backbone(plan.trained_for, backbone.identity)
    plans = 1 + len(keeps) if plan.reducer is not None else 1
    report: dict[str, Any] = {**about(backbone), **asdict(chosen), "rows": []}
    with tqdm(total=len(batches) * plans * (1 + chosen.runs), unit="run", desc="bench") as bar:
        for batch in batches:
            report["rows"] += bench(backbone, plan, keeps, batch, chosen, bar.update)
            write_atomic(out, json.dumps(report, indent=2) + "\n")  # a killed run keeps the sizes that are done
    settings.save(chosen, settings.beside(out))
    print(table(report), end="")
    print(f"report: {out}")


def named_spec(chosen: ReducerSettings, backbone: Backbone) -> ReducerSpec:
    """The plan for a name; a reducer that needs training gets random weights, since its time does not depend on them.

    Raises:
        UserError: options that do not fit.
    """
    cls = available()[chosen.name]
    if not cls.trained:
        return find_spec(chosen, 1.0)
    torch.manual_seed(0)
    return ReducerSpec(create_for(backbone.identity, chosen.name, chosen.options).eval())


@torch.inference_mode()
def bench(
    backbone: Backbone,
    plan: ReducerSpec,
    keeps: Sequence[int | float],
    batch: int,
    chosen: BenchSettings,
    on_run: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of the report for one batch size: the plain backbone, then every budget."""
    model, reducer = backbone.model, plan.reducer
    inputs = workload(backbone, batch, chosen.visual, chosen.text)
    visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    budgets = {str(keep): Budget.parse(keep).count(visual) for keep in keeps if reducer is not None}

    def once(keep: int | None) -> Phases:
        at = ReducerSpec() if keep is None else replace(plan, keep=keep)
        phases, kept = watched(backbone, inputs, at, chosen.new_tokens, chosen.clock)
        arrived[keep] = visual if kept is None else kept
        on_run()
        return phases

    arrived: dict[int | None, int] = {}
    counted: dict[int | None, int] = {}
    looked: dict[int | None, int] = {}  # by a reducer whose layers look back, at each further token
    peaks: dict[int | None, int] = {}
    with ExitStack() as stack:
        if not chosen.tower:
            if reducer is not None and looks_into_tower(reducer):
                raise UserError(f"tower=false: the reducer '{reducer.name}' looks into the tower; leave it on")
            stack.enter_context(pictures_given(backbone, inputs))
        plans: dict[str, int | None] = {PLAIN: None, **budgets}
        for keep in plans.values():  # the uncounted runs, which warm up as well
            with ModuleFlops(reducer, model) as flops:
                peaks[keep] = peak_bytes(partial(once, keep), model.device)
            counted[keep], looked[keep] = flops.total, flops.later // max(1, chosen.new_tokens - 1)
        times = alternate({name: partial(once, keep) for name, keep in plans.items()}, chosen.runs)
    shapes = {k: v for k, v in inputs.items() if chosen.tower or k in ("input_ids", "attention_mask")}
    whole = price(model, shapes)
    rows = []
    for name, keep in plans.items():
        at = None if keep is None else reducer
        cost = price(model, shapes, at, keep, arrived[keep], counted[keep])
        cost = replace(cost, decode=cost.decode + looked[keep])
        rows.append({"batch": batch, "keep": name, "tokens": arrived[keep] if keep is None else keep})
        rows[-1] |= _row(cost, whole, times[name], times[PLAIN]) | {"peak_bytes": peaks[keep]}
    return rows


def watched(
    backbone: Backbone, inputs: Mapping[str, Any], plan: ReducerSpec, new_tokens: int, clock: str = "wall"
) -> tuple[Phases, int | None]:
    """The phases of one ``generate`` under a plan, and the visual tokens of a prompt that stayed; None for all."""
    model, used = backbone.model, None
    with ExitStack() as stack:
        if plan.reducer is not None:
            used = stack.enter_context(attach(model, plan.reducer, plan.keep, plan.positions))
        watch = stack.enter_context(PhaseTimer(model, plan.reducer, clock))
        model.generate(**inputs, streamer=watch, do_sample=False, max_new_tokens=new_tokens)
    return watch.phases(), None if used is None else used.stats.kept // len(inputs["input_ids"])


def looks_into_tower(reducer: Reducer) -> bool:
    """Whether a reducer needs more of the tower than its projected features."""
    return not shares_encoding(reducer) or bool(tower_signals(reducer) - {"text"})


def _row(cost: Cost, whole: Cost, times: list[Phases], plain: list[Phases]) -> dict[str, Any]:
    """What was counted and measured for one plan, and how it compares with the plain backbone in the same turns."""
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


def _listed(value: Any, name: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{name}=[] holds nothing: give one or more, as {name}=[1,4]")
    return values
