"""Accuracy against the budget and against the measured time, as one picture."""

from pathlib import Path
from typing import Any, BinaryIO

from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.report.lookup import entries, ranked

COLOURS = ("#1f6fb4", "#d95f02", "#c23b4a", "#1b9e77", "#a6438f", "#b8860b", "#4b4b8f", "#8c564b")
GREYS = ("#8a8a8a", "#a8a8a8", "#707070", "#bdbdbd")
MARKERS = "osD^vPX*"
OTHERS: dict[str, Any] = {"color": "#c4c4c4", "lw": 1.0, "ms": 3, "marker": ".", "zorder": 2}
Entry = dict[str, Any]


def plot(report: dict[str, Any], path: str | Path | BinaryIO) -> None:
    """Draw a summary; the suffix of ``path`` gives the format, an open file PNG.

    Left accuracy against kept tokens, with its interval as a band. Right, when times were measured, accuracy against
    the time to the first token, with quartiles and the frontier: the points that nothing faster equals. Accuracy is
    relative to all tokens where these answer anything right. Dashed: all tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = bool(points(report))
    figure = Figure(figsize=(12.5 if timed else 7.4, 4.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # drawn to a file, so no display and no global state of pyplot
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    looks = styles(report)
    for name in ranked(report):
        mine = [entry for entry in report["scores"] if entry["reducer"] == name and "error" not in entry]
        label, style = (name, looks[name]) if name in looks else (None, OTHERS)
        _against_budget(panels[0], sorted(mine, key=lambda entry: entry["kept_tokens"]), label, style)
        if timed:
            _against_time(panels[1], [entry for entry in mine if "first_token_ms" in entry], style)
    if more := len(report["reducers"]) - len(looks):
        panels[0].plot([], [], color=OTHERS["color"], marker=".", label=f"{more} others")
    _all_tokens(panels, report)
    if timed:
        reached = frontier([point for found in points(report).values() for point in found])
        panels[1].step(*zip(*reached, strict=True), where="post", color="black", lw=5, alpha=0.10, zorder=1)
        clock = "processor time" if report.get("clock") == "cpu" else "time"
        panels[1].set_xlabel(f"{clock} to the first token, ms (median and quartiles; shaded: frontier)")
    _budget_axis(panels[0], report)
    relative = any("relative" in entry for entry in report["scores"])
    panels[0].set_ylabel("accuracy, % of all tokens" if relative else "answer accuracy, %")
    for axes in panels:
        axes.grid(color="#dddddd", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['backbone']}: {report['rows']} questions, 95% intervals", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path)  # an open file gets matplotlib's default, PNG


def styles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines with a look of their own; further ones share one.

    Where there are trained reducers they are coloured and the others grey; otherwise the best are coloured.
    """
    names, facts = ranked(report), report["reducers"]
    trained = [name for name in names if facts[name].get("trained")]
    coloured = trained or names[: len(COLOURS)]
    found = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "lw": 1.7, "ms": 5, "zorder": 3}
        for i, name in enumerate(coloured)
    }
    greys = [name for name in names if name not in coloured][: len(MARKERS) if trained else 0]
    for i, name in enumerate(greys):
        look = {"color": GREYS[i % len(GREYS)], "marker": MARKERS[i], "lw": 1.0, "ms": 4, "ls": ":", "zorder": 2}
        found[name] = look
    return found


def points(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds to the first token and accuracy in %, by reducer, in the order of the budgets."""
    out: dict[str, list[tuple[float, float]]] = {}
    for entry in report["scores"]:
        if entry["keep"] is not None and "error" not in entry and "first_token_ms" in entry:
            out.setdefault(entry["reducer"], []).append((entry["first_token_ms"]["median"], _share(entry)[0]))
    return out


def frontier(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that nothing faster equals: each more accurate than all before it."""
    out: list[tuple[float, float]] = []
    for time, share in sorted(found, key=lambda point: (point[0], -point[1])):
        if not out or share > out[-1][1]:
            out.append((time, share))
    return out


def _share(entry: Entry) -> tuple[float, float, float]:
    """Accuracy in % with the ends of its interval; relative to all tokens where it is known."""
    name, prefix = ("relative", "relative_") if "relative" in entry else ("accuracy", "")
    low, high = entry[f"{prefix}low"], entry[f"{prefix}high"]
    return 100 * entry[name], 100 * low, 100 * high


def _against_budget(axes: Any, mine: list[Entry], label: str | None, style: dict[str, Any]) -> None:
    counts = [entry["kept_tokens"] for entry in mine]
    axes.plot(counts, [_share(entry)[0] for entry in mine], label=label, **style)
    if label is not None and "ls" not in style:
        low, high = ([_share(entry)[end] for entry in mine] for end in (1, 2))
        axes.fill_between(counts, low, high, color=style["color"], alpha=0.10, lw=0)


def _against_time(axes: Any, mine: list[Entry], style: dict[str, Any]) -> None:
    times = [entry["first_token_ms"] for entry in mine]
    medians = [time["median"] for time in times]
    across = ([t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times])
    axes.errorbar(medians, [_share(entry)[0] for entry in mine], xerr=across, elinewidth=1.0, **style)


def _all_tokens(panels: Any, report: dict[str, Any]) -> None:
    """A dashed line, with the interval of its accuracy where accuracy is absolute, and a star at its time."""
    whole = entries(report)[ALL_TOKENS, None]
    relative = any("relative" in entry for entry in report["scores"])
    at, low, high = (100.0, 100.0, 100.0) if relative else _share(whole)
    for axes in panels:
        label = f"{ALL_TOKENS} ({report['visual_tokens']})"
        axes.axhline(at, color="black", ls="--", lw=1.2, label=label)
        axes.axhspan(low, high, color="black", alpha=0.06, lw=0)
    if len(panels) > 1 and "first_token_ms" in whole:
        panels[1].plot([whole["first_token_ms"]["median"]], [at], "k*", ms=12, zorder=4)


def _budget_axis(axes: Any, report: dict[str, Any]) -> None:
    counts = {keep if isinstance(keep, int) else round(keep * report["visual_tokens"]) for keep in report["keeps"]}
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(counts), [f"{count:g}" for count in sorted(counts)])
        axes.minorticks_off()
    axes.set_xlabel("visual tokens kept per image")
