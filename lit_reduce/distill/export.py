"""What training writes: the plug-in with its card, and the table that compares it with the baselines."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_reduce.backbones import Backbone
from lit_reduce.distill.sources import table_rows
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.evaluate.results import ALL_TOKENS, Results
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.plugin import PluginConfig, save_plugin
from lit_reduce.reducer import Reducer, create
from lit_reduce.report.markdown import markdown
from lit_reduce.report.summary import Line, facts, summary
from lit_reduce.report.write import write_report
from lit_reduce.settings.train import TrainSettings


def export(settings: TrainSettings, backbone: Backbone, reducer: Reducer, folder: Path) -> PluginConfig:
    """Writes the trained plug-in, before any table is made, and returns its config."""
    config = plugin_config(settings, backbone, reducer)
    config.metrics = {"trained_on": machine(backbone.model.device)}
    save_plugin(folder, reducer, config, {"notes": notes(settings)})
    return config


def plugin_config(settings: TrainSettings, backbone: Backbone, reducer: Reducer) -> PluginConfig:
    """What the plug-in says about itself."""
    return PluginConfig(
        reducer=reducer.name, options=dict(vars(reducer.config)), backbone=backbone.identity,
        budgets=sorted(settings.budgets), positions=settings.positions,
    )  # fmt: skip


def write_table(
    settings: TrainSettings, backbone: Backbone, reducer: Reducer, config: PluginConfig, output: Path, plugin: Path
) -> None:
    """Compares a plug-in with the baselines: the table goes to ``output``, its figures to the card in ``plugin``."""
    results, lines = compare(settings, backbone, reducer)
    report = summary(results, lines)
    write_report(report, output / "table.json")
    own = {name: value for name, value in config.metrics.items() if not isinstance(value, dict)}
    config.metrics = {**card_metrics(settings.reducer.name, report), **own}
    save_plugin(plugin, reducer, config, {"notes": notes(settings, results, backbone.model.device)})
    print(markdown(report), end="")
    print(f"table: {output / 'table'}.json, .md, .png")


def compare(settings: TrainSettings, backbone: Backbone, reducer: Reducer) -> tuple[Results, dict[str, Line]]:
    """Scores the reducer and the baselines on the test rows at every budget of the table; returns the lines as well."""
    rows, total = table_rows(settings.data)
    specs = {settings.reducer.name: ReducerSpec(reducer, positions=settings.positions)}
    specs |= {name: ReducerSpec(create(name)) for name in settings.baselines}
    most = backbone.identity.tokens or max(settings.table_budgets)  # 0 where the count depends on the picture
    keeps = [k for k in settings.table_budgets if k <= most]
    lines = {name: Line([name], facts=facts(spec)) for name, spec in specs.items()}
    with tqdm(total=total, desc="table", unit="row") as bar:
        results = evaluate(backbone, specs, keeps, rows, settings.table_batch, bar.update, timing_runs=settings.runs)
    return results, lines


def card_metrics(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Accuracy with its interval and time to first token by budget, for the model card."""
    entries = [e for e in report["scores"] if e["reducer"] in (name, ALL_TOKENS)]
    by_budget = {"all" if e["keep"] is None else str(e["keep"]): e for e in entries}
    metrics: dict[str, Any] = {"accuracy": {k: [e["accuracy"], e["low"], e["high"]] for k, e in by_budget.items()}}
    for phase in ("first_token_ms", "reducer_ms"):
        timed = {k: e[phase]["median"] for k, e in by_budget.items() if phase in e}
        metrics |= {phase: timed} if timed else {}
    return metrics


def notes(settings: TrainSettings, results: Results | None = None, device: torch.device | None = None) -> str:
    """The card's account of how the plug-in and its numbers came about."""
    made = (
        f"Trained on `{settings.data.name}` ({settings.data.images} pictures, {settings.steps} steps of "
        f"{settings.pictures * settings.turns} questions, seed {settings.seed})"
        f"{'' if settings.init_from is None else ', from the weights of `' + settings.init_from + '` on'}."
    )
    if results is None or device is None:
        return made
    made += f" Scored on {results.rows} test questions."
    if not settings.runs:
        return made
    return f"{made} Times: {machine(device)}, one question, median of {settings.runs} alternating runs."


def machine(device: torch.device) -> str:
    """The name of what computes, as the card shows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
