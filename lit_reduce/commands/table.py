"""``lit-reduce table``: the plug-ins of a backbone and the yardsticks at every budget, scored, counted and timed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_reduce import settings
from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.bench import watched
from lit_reduce.benchmark.bench_table import about
from lit_reduce.benchmark.flops import price
from lit_reduce.benchmark.latency import alternate, spread
from lit_reduce.benchmark.phase_timer import CLOCKS
from lit_reduce.benchmark.profiling import ModuleFlops
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.compare import find_specs
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Asked, Results, Score, evaluate, reason
from lit_reduce.evaluate.run import Named, ScoreSettings, check, open_backbone, questions, score
from lit_reduce.files import atomic_path, check_writable, write_atomic
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.plugin import WEIGHTS
from lit_reduce.report.pareto import pareto
from lit_reduce.report.seeds import Lines, markdown, summary
from lit_reduce.settings import ReducerSettings
from lit_reduce.tokens import Budget
from lit_reduce.version import __version__


@dataclass
class TableSettings(ScoreSettings):
    """Settings of ``table``; ``configs/table.yaml`` explains each."""

    plugins: str = "checkpoints/pocket"
    methods: list[str] = field(default_factory=list)
    yardsticks: list[Any] = field(default_factory=list)
    answers: str = "outputs/table"
    clock: str = "wall"


def table(chosen: TableSettings, named: Named | None = None) -> None:
    """Make the table: JSON, Markdown and a plot of accuracy against measured time.

    A plug-in that is missing or fails becomes a line with its reason. Answers are kept by reducer and budget: a killed
    run goes on, and a further plug-in costs its own questions only.

    Raises:
        UserError: A setting, the data, the backbone or a yardstick's name is not usable.
    """
    keeps = check(chosen, ".json")
    if chosen.clock not in CLOCKS:
        raise UserError(f"clock={chosen.clock} is not known: use {' or '.join(CLOCKS)}")
    lines, plans = find_lines(chosen, keeps[0])
    rows, backbone = questions(chosen, named or {}), open_backbone(chosen)
    results = answered(chosen, backbone, plans, keeps, rows)
    costs = measured(backbone, lines, plans, results, keeps, rows[0], chosen.runs, chosen.clock)
    report = {**about(backbone), **summary(results, lines, keeps), "clock": chosen.clock, "costs": costs}
    out = Path(chosen.out)
    write_atomic(out, json.dumps(report, indent=2) + "\n")
    write_atomic(out.with_suffix(".md"), markdown(report))
    with atomic_path(out.with_suffix(".png")) as temporary:
        pareto(report, temporary)
    settings.save(chosen, settings.beside(out))
    print(markdown(report), end="")
    print(f"written: {', '.join(str(out.with_suffix(suffix)) for suffix in ('.json', '.md', '.png'))}")


def find_lines(chosen: TableSettings, keep: int | float) -> tuple[Lines, dict[str, ReducerSpec]]:
    """The lines of the table and all plans in them, both by name; of plug-ins that do not load the reason.

    ``NAME``, ``NAME-seed1``, ``NAME-seed2``, ... below the folder of plug-ins are one line.

    Raises:
        UserError: Two lines of one name, or an unknown yardstick.
    """
    plans, broken = find_specs(chosen.yardsticks, keep) if chosen.yardsticks else ({}, {})
    yardsticks: Lines = {name: {"trained": False, "plans": [name]} for name in plans}
    yardsticks |= {name: {"trained": False, "plans": [], "errors": {name: error}} for name, error in broken.items()}
    lines: Lines = {}
    for name in chosen.methods:
        if name in lines or name in yardsticks:
            raise UserError(f"the table has two lines for {name}: leave one out")
        line = lines[name] = {"trained": True, "plans": [], "errors": {}}
        for folder in seeds_of(Path(chosen.plugins), name):
            try:
                plan = find_spec(ReducerSettings(str(folder)), keep)
            except UserError as error:
                line["errors"][folder.name] = str(error)
                continue
            plans[folder.name] = plan
            line["plans"].append(folder.name)
            if plan.reducer is not None:
                line["parameters"] = sum(weight.numel() for weight in plan.reducer.parameters())
                line["bytes"] = (folder / WEIGHTS).stat().st_size
                line |= {"kind": plan.reducer.kind, "site": plan.reducer.site, "paper": plan.reducer.paper}
    return lines | yardsticks, plans


def seeds_of(folder: Path, name: str) -> list[Path]:
    """The folders of one method's plug-ins; that of its name alone where there is none, so that it is missed."""
    return [folder / name, *sorted(path for path in folder.glob(f"{name}-seed*") if path.is_dir())]


def answered(
    chosen: TableSettings,
    backbone: Backbone,
    plans: Mapping[str, ReducerSpec],
    keeps: list[int | float],
    rows: list[Row],
) -> Results:
    """Scores of all plans, from what was kept where that answers these questions; the rest is asked now."""
    store = Path(chosen.answers)
    asked = hashlib.sha256(repr([(row.source, row.prompt, row.answer) for row in rows]).encode()).hexdigest()
    base = [__version__, backbone.identity.hash, asked, chosen.max_new_tokens]
    files: dict[Asked, Path] = {(ALL_TOKENS, None): store / f"all-{_digest(base)}.json"}
    for (name, plan), keep in product(plans.items(), keeps):
        weights = None if plan.trained_for is None else plan.trained_for.weights_sha256
        facts = [*base, keep, weights, plan.positions, plan.reducer and (plan.reducer.name, plan.reducer.config)]
        files[name, keep] = store / f"{name.replace('/', '_')}-{keep}-{_digest(facts)}.json"
    known = {key for key, path in files.items() if path.is_file()}
    found: dict[Asked, Score] = {}
    if known != set(files):
        # One question first: what fails there is not kept, so it is tried again next time, but not on all questions.
        trial = evaluate(backbone, plans, keeps, rows[:1], max_new_tokens=1, tolerant=True, known=known)
        found = {(one.reducer, one.keep): one for one in trial.scores if one.error is not None}
    left_out = known | set(found)
    if left_out != set(files):
        quick = replace(chosen, out=str(store / f"run-{asked[:12]}.json"), runs=0)
        check_writable(quick.out)
        results, journal = score(quick, backbone, plans, keeps, rows, tolerant=True, known=left_out)
        for one in results.scores:
            found[one.reducer, one.keep] = one
            if one.error is None:
                content = {"tokens": results.tokens, "families": results.families, "score": asdict(one)}
                write_atomic(files[one.reducer, one.keep], json.dumps(content) + "\n")
        journal.unlink()
    kept = {key: json.loads(path.read_text()) for key, path in files.items() if key not in found}
    found |= {key: Score(**content["score"]) for key, content in kept.items()}
    whole = json.loads(files[ALL_TOKENS, None].read_text())
    return Results(backbone.identity.id, len(rows), whole["tokens"], [found[key] for key in files], whole["families"])


def _digest(facts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


@torch.inference_mode()
def measured(
    backbone: Backbone, lines: Lines, plans: Mapping[str, ReducerSpec], results: Results, keeps: Sequence[int | float],
    row: Row, runs: int, clock: str = "wall",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """FLOPs up to the first token and measured times of every line at every budget, on one question.

    The first sound seed speaks for its line: times do not depend on weights. All runs take turns, after one of each to
    warm up. What cannot be run or priced has an ``error`` in its place.

    Returns:
        By line, then by budget (``all`` for the plain backbone's, under all tokens).
    """
    inputs = backbone.prepare([row.open()], [row.prompt])
    where: dict[str, tuple[str, str, ReducerSpec]] = {ALL_TOKENS: (ALL_TOKENS, "all", ReducerSpec())}
    for name, line in lines.items():
        for keep in keeps:
            sound = [each for each in line["plans"] if results.score(each, keep).error is None]
            if sound:
                where[f"{name} at {keep}"] = (name, str(keep), replace(plans[sound[0]], keep=keep))
    costs: dict[str, dict[str, Any]] = {}
    timed = {}
    for key, (name, at, plan) in where.items():
        entry = costs.setdefault(name, {}).setdefault(at, {})
        try:
            with ModuleFlops(plan.reducer) as counted:
                _, kept = watched(backbone, inputs, plan, 1)
            budget = None if plan.reducer is None else Budget.parse(plan.keep).count(results.tokens)
            cost = price(backbone.model, inputs, plan.reducer, budget, kept, counted.total)
        except Exception as error:  # noqa: BLE001  one line must not cost the table
            entry["error"] = reason(error)
            continue
        entry |= {"flops": asdict(cost) | {"first_token": cost.first_token}}
        timed[key] = lambda plan=plan: watched(backbone, inputs, plan, 1, clock)[0]
    with tqdm(total=len(timed) * runs, unit="run", desc="times") as bar:
        found = alternate({key: _counted(run, bar) for key, run in timed.items()}, runs)
    for key, phases in found.items():
        name, at, _ = where[key]
        for phase in ("first_token", "prefill", "reducer") if phases else ():
            costs[name][at][f"{phase}_ms"] = spread([getattr(each, phase) for each in phases])._asdict()
    return costs


def _counted(run: Any, bar: Any) -> Any:
    def once() -> Any:
        bar.update()
        return run()

    return once
