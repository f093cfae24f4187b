"""``lit-reduce evaluate``: score reducers on a user's file and write the report."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_reduce import settings
from lit_reduce.backbones import load
from lit_reduce.data.jsonl import read_rows
from lit_reduce.errors import UserError
from lit_reduce.evaluate.plan import Plan, find_plan
from lit_reduce.evaluate.report import text_table, write_report
from lit_reduce.evaluate.suite import evaluate
from lit_reduce.files import check_writable
from lit_reduce.settings import BackboneSettings, ReducerSettings
from lit_reduce.tokens import Budget


@dataclass
class EvaluateSettings:
    """Settings of ``evaluate``; ``configs/evaluate.yaml`` explains each."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    reducer: ReducerSettings = field(default_factory=ReducerSettings)
    yardsticks: list[str] = field(default_factory=list)
    keep: Any = 64
    data: str | None = None
    out: str = "outputs/report.json"
    limit: int | None = None
    max_new_tokens: int = 32
    batch_size: int = 16
    runs: int = 5


def run(chosen: EvaluateSettings) -> None:
    """Score the reducer and the yardsticks at every budget; writes JSON, Markdown and a plot, prints a table.

    Raises:
        UserError: A setting, the data, a picture or a plug-in is not usable.
    """
    if chosen.data is None:
        raise UserError("no data are given: write data=FILE.jsonl with image, prompt and answer in each line")
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("runs", 0), ("limit", 1)):
        if getattr(chosen, name) is not None and getattr(chosen, name) < least:
            raise UserError(f"{name}={getattr(chosen, name)}: give {least} or more")
    keeps = [Budget.parse(keep).value for keep in (chosen.keep if isinstance(chosen.keep, list) else [chosen.keep])]
    if not keeps:
        raise UserError("keep=[] holds no budget: give one or more, as keep=[64,32]")
    plans: dict[str, Plan] = {}
    for reducer in [chosen.reducer, *(ReducerSettings(name) for name in chosen.yardsticks)]:
        plan = find_plan(reducer, keeps[0])
        if plan.reducer is not None:
            label = plan.reducer.name if plan.reducer.name not in plans else reducer.name
            plans[label] = plan
    out = Path(chosen.out)
    if out.suffix != ".json":
        raise UserError(f"out={out}: the report is JSON, so give a name that ends in .json")
    check_writable(out)
    rows = read_rows(chosen.data, need_answers=True)[: chosen.limit]
    backbone = load(chosen.backbone.name, chosen.backbone.dtype, chosen.backbone.device, chosen.backbone.revision)
    for plan in plans.values():
        for keep in keeps:
            replace(plan, keep=keep).check(backbone)
    with tqdm(total=len(rows), unit="row", desc="evaluate") as bar:
        results = evaluate(
            backbone,
            {name: plan.reducer for name, plan in plans.items() if plan.reducer is not None},
            keeps,
            rows,
            chosen.batch_size,
            bar.update,
            positions={name: plan.positions for name, plan in plans.items()},
            max_new_tokens=chosen.max_new_tokens,
            timing_runs=chosen.runs,
        )
    report = write_report(results, out)
    settings.save(chosen, settings.beside(out))
    print(text_table(report), end="")
    print(f"report: {out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}")
