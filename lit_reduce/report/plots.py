"""Accuracy against the budget and against the measured time, as a picture."""

from pathlib import Path
from typing import Any, BinaryIO

COLOURS = ("#1f6fb4", "#d95f02", "#c23b4a", "#1b9e77", "#a6438f", "#b8860b", "#4b4b8f", "#8c564b")
MARKERS = "osD^vPX*"
REST = "#c4c4c4"


def plot(report: dict[str, Any], path: str | Path | BinaryIO) -> None:
    """Draw a summary of :mod:`lit_reduce.report.accuracy`; the suffix of ``path`` gives the format, an open file PNG.

    Left accuracy against kept tokens, one line a reducer with its interval as a band; right, when times were measured,
    accuracy against the time to the first token with the quartiles of its runs. Dashed: all tokens. The best eight
    reducers have colours of their own, further ones share one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sound = [entry for entry in report["scores"] if "error" not in entry]
    timed = any("ttft_ms" in entry for entry in sound if entry["keep"] is not None)
    figure = Figure(figsize=(11.5 if timed else 7.4, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # drawn to a file, so no display and no global state of pyplot
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    lines = _lines(sound)
    best = sorted(lines, key=lambda name: -sum(entry["accuracy"] for entry in lines[name]) / len(lines[name]))
    order = [name for name in lines if name in best[: len(COLOURS)]]
    for name, entries in lines.items():
        place = order.index(name) if name in order else None
        style = {"color": REST, "lw": 1.0, "ms": 3, "marker": ".", "zorder": 2}
        if place is not None:
            style = {"color": COLOURS[place], "lw": 1.7, "ms": 5, "marker": MARKERS[place], "zorder": 3}
        _against_budget(panels[0], entries, name if place is not None else None, style)
        if timed:
            _against_time(panels[1], entries, style)
    if len(lines) > len(order):
        panels[0].plot([], [], color=REST, marker=".", label=f"{len(lines) - len(order)} others")
    whole = [entry for entry in sound if entry["keep"] is None]
    for entry in whole:
        for axes in panels:
            label = f"{entry['reducer']} ({report['visual_tokens']})"
            axes.axhline(100 * entry["accuracy"], color="black", ls="--", lw=1.2, label=label)
            axes.axhspan(100 * entry["low"], 100 * entry["high"], color="black", alpha=0.06, lw=0)
        if timed and "ttft_ms" in entry:
            panels[1].plot([entry["ttft_ms"]], [100 * entry["accuracy"]], "k|", ms=14)
    keeps = {entry["keep"] for entry in sound if entry["keep"] is not None}
    ticks = sorted({keep if isinstance(keep, int) else round(keep * report["visual_tokens"]) for keep in keeps})
    if ticks:
        panels[0].set_xscale("log", base=2)
        panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0].minorticks_off()
    panels[0].set_xlabel("visual tokens kept per image")
    panels[0].set_ylabel("answer accuracy, %")
    if timed:
        panels[1].set_xlabel("time to the first token, ms (median and quartiles)")
    for axes in panels:
        axes.grid(color="#dddddd", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['backbone']}: {report['rows']} questions, 95% intervals", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path)


def _lines(sound: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The entries of each reducer, by kept tokens."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(sound, key=lambda entry: entry["kept_tokens"]):
        if entry["keep"] is not None:
            lines.setdefault(entry["reducer"], []).append(entry)
    first = [entry["reducer"] for entry in sound if entry["keep"] is not None]
    return {name: lines[name] for name in dict.fromkeys(first)}


def _against_budget(axes: Any, entries: list[dict[str, Any]], label: str | None, style: dict[str, Any]) -> None:
    counts = [entry["kept_tokens"] for entry in entries]
    axes.plot(counts, [100 * entry["accuracy"] for entry in entries], label=label, **style)
    if label is not None:
        low, high = [100 * entry["low"] for entry in entries], [100 * entry["high"] for entry in entries]
        axes.fill_between(counts, low, high, color=style["color"], alpha=0.12, lw=0)


def _against_time(axes: Any, entries: list[dict[str, Any]], style: dict[str, Any]) -> None:
    entries = [entry for entry in entries if "ttft_ms" in entry]
    times = [entry["ttft_ms"] for entry in entries]
    values = [100 * entry["accuracy"] for entry in entries]
    below = [entry["ttft_ms"] - entry["ttft_quartiles_ms"][0] for entry in entries]
    above = [entry["ttft_quartiles_ms"][1] - entry["ttft_ms"] for entry in entries]
    axes.errorbar(times, values, xerr=(below, above), elinewidth=1.0, **style)
