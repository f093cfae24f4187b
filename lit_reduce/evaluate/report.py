"""One table of accuracy by budget: as JSON, as text, as Markdown and as a plot."""

import json
from pathlib import Path
from typing import Any

import torch

from lit_reduce.evaluate.bootstrap import interval
from lit_reduce.evaluate.suite import ALL_TOKENS, Results, Score
from lit_reduce.files import atomic_path, write_atomic

COLOURS = ("#1f6fb4", "#d95f02", "#7a7a7a", "#1b9e77", "#a6438f", "#b8860b", "#4b4b8f", "#8c564b")
MARKERS = "osD^vPX*"


def summary(results: Results) -> dict[str, Any]:
    """Everything measured, as plain data: the content of ``report.json``."""
    return {
        "backbone": results.backbone,
        "rows": results.rows,
        "visual_tokens": results.tokens,
        "interval": "95% percentile bootstrap over rows",
        "scores": [_entry(score) for score in results.scores],
    }


def _entry(score: Score) -> dict[str, Any]:
    correct = torch.tensor(score.correct, dtype=torch.float64)
    low, high = interval(correct)
    entry: dict[str, Any] = {"reducer": score.reducer, "keep": score.keep, "kept_tokens": score.kept}
    entry |= {"accuracy": correct.mean().item(), "low": low, "high": high}
    if score.timing is not None:
        entry |= {"ttft_ms": score.timing.median, "ttft_quartiles_ms": [score.timing.low, score.timing.high]}
        entry |= {"reducer_ms": score.timing.reducer_ms}
    return entry


def markdown(report: dict[str, Any]) -> str:
    """The table of a summary in Markdown: one line a reducer, one column a budget, best of each column in bold."""
    keeps = _keeps(report)
    entries = {(entry["reducer"], entry["keep"]): entry for entry in report["scores"]}
    best = {keep: max((_percent(e) for (name, at), e in entries.items() if at == keep), key=float) for keep in keeps}
    lines = ["| reducer | " + " | ".join(f"keep {keep}" for keep in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for name in _names(report):
        cells = []
        for keep in keeps:
            entry = entries.get((name, keep))
            text = "" if entry is None else f"{_percent(entry)} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
            cells.append(f"**{text}**" if entry is not None and _percent(entry) == best[keep] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = entries.get((ALL_TOKENS, None))
    if whole is not None:
        text = f"{_percent(whole)} [{100 * whole['low']:.1f}, {100 * whole['high']:.1f}]"
        lines.insert(2, f"| {ALL_TOKENS} ({report['visual_tokens']}) | " + " | ".join([text] * len(keeps)) + " |")
    return "\n".join(lines) + "\n"


def text_table(report: dict[str, Any]) -> str:
    """The same numbers for a terminal, one line for each reducer and budget, times included when they were measured."""
    header = f"{'reducer':<14}{'keep':>8}{'accuracy %':>12}{'95% interval':>16}{'first token ms':>16}{'reducer ms':>12}"
    lines = [header, "-" * len(header)]
    for entry in report["scores"]:
        keep = report["visual_tokens"] if entry["keep"] is None else entry["keep"]
        span = f"{100 * entry['low']:.1f} - {100 * entry['high']:.1f}"
        time = f"{entry['ttft_ms']:.1f}" if "ttft_ms" in entry else "-"
        own = f"{entry['reducer_ms']:.2f}" if entry.get("reducer_ms") is not None else "-"
        lines.append(f"{entry['reducer']:<14}{keep!s:>8}{_percent(entry):>12}{span:>16}{time:>16}{own:>12}")
    return "\n".join(lines) + "\n"


def write_report(results: Results, path: str | Path) -> dict[str, Any]:
    """Write ``path`` (JSON) and, beside it, the same name with ``.md`` and ``.png``; returns the summary."""
    path, report = Path(path), summary(results)
    write_atomic(path, json.dumps(report, indent=2) + "\n")
    write_atomic(path.with_suffix(".md"), markdown(report))
    with atomic_path(path.with_suffix(".png")) as temporary:
        plot(report, temporary)
    return report


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Accuracy against budget, one line a reducer with its interval as a band; a dashed line for all tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # drawn to a file, so no display and no global state of pyplot
    axes = figure.add_subplot()
    for index, name in enumerate(_names(report)):
        entries = [entry for entry in report["scores"] if entry["reducer"] == name]
        entries.sort(key=lambda entry: entry["kept_tokens"])
        counts = [entry["kept_tokens"] for entry in entries]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        values = [100 * entry["accuracy"] for entry in entries]
        first = index == 0
        axes.plot(counts, values, color=colour, marker=marker, lw=2.2 if first else 1.5, ms=5, label=name, zorder=3)
        low, high = [100 * entry["low"] for entry in entries], [100 * entry["high"] for entry in entries]
        axes.fill_between(counts, low, high, color=colour, alpha=0.13, lw=0)
    for entry in report["scores"]:
        if entry["keep"] is None:
            label = f"{ALL_TOKENS} ({report['visual_tokens']})"
            axes.axhline(100 * entry["accuracy"], color="black", ls="--", lw=1.2, label=label)
            axes.axhspan(100 * entry["low"], 100 * entry["high"], color="black", alpha=0.06, lw=0)
    ticks = sorted({entry["kept_tokens"] for entry in report["scores"] if entry["keep"] is not None})
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel("visual tokens kept per image")
    axes.set_ylabel("answer accuracy, %")
    axes.set_title(f"{report['backbone']}: {report['rows']} questions, 95% intervals", fontsize=11)
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)


def _names(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["reducer"] for entry in report["scores"] if entry["keep"] is not None))


def _keeps(report: dict[str, Any]) -> list[Any]:
    return list(dict.fromkeys(entry["keep"] for entry in report["scores"] if entry["keep"] is not None))


def _percent(entry: dict[str, Any]) -> str:
    return f"{100 * entry['accuracy']:.1f}"
