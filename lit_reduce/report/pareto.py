"""Accuracy against measured time as a picture, with the best of both in view."""

from pathlib import Path
from typing import Any, BinaryIO

from lit_reduce.evaluate.evaluator import ALL_TOKENS
from lit_reduce.report.seeds import ranked

COLOURS = (
    "#1f6fb4", "#d95f02", "#1b9e77", "#c23b4a", "#7b3fa0", "#b8860b", "#17a2b8", "#8c564b", "#e377c2", "#3d5a1e",
)  # fmt: skip
MARKERS = "osD^vPX*<>"
GREYS = ("#8a8a8a", "#a8a8a8", "#707070", "#bdbdbd")


def points(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds to the first token and accuracy in % of all tokens, by line, in the order of the budgets."""
    out: dict[str, list[tuple[float, float]]] = {}
    for name in ranked(report):
        for keep, each in report["lines"][name]["budgets"].items():
            cost = report["costs"].get(name, {}).get(keep, {})
            if "relative" in each and "first_token_ms" in cost:
                out.setdefault(name, []).append((cost["first_token_ms"]["median"], 100 * each["relative"]))
    return out


def frontier(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that nothing faster equals: each more accurate than all before it."""
    out: list[tuple[float, float]] = []
    for time, share in sorted(found, key=lambda point: (point[0], -point[1])):
        if not out or share > out[-1][1]:
            out.append((time, share))
    return out


def pareto(report: dict[str, Any], path: str | Path | BinaryIO) -> None:
    """Draw the table of :mod:`lit_reduce.evaluate.table`, one line a method through its budgets.

    Trained methods have colours and bars from the quartiles of their times and the interval of their accuracy;
    yardsticks are grey. The stairs are the frontier: more accurate only for more time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # drawn to a file, so no display and no global state of pyplot
    axes = figure.subplots()
    lines = points(report)
    reached = frontier([point for found in lines.values() for point in found])
    if reached:
        times, shares = zip(*reached, strict=True)
        axes.step(times, shares, where="post", color="black", lw=5, alpha=0.10, label="frontier", zorder=1)
    trained = [name for name in lines if report["lines"][name]["trained"]]
    for name, found in lines.items():
        times, shares = zip(*found, strict=True)
        if name in trained:
            place = trained.index(name)
            style: dict[str, Any] = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
                "zorder": 3,
            }
            axes.plot(times, shares, lw=1.8, ms=6, label=name, **style)
            for x, y, across, along in _bars(report, name):
                axes.errorbar(x, y, xerr=across, yerr=along, color=style["color"], elinewidth=0.8, alpha=0.45, zorder=2)
        else:
            place = len([other for other in list(lines)[: list(lines).index(name)] if other not in trained])
            style = {"color": GREYS[place % len(GREYS)], "marker": MARKERS[place % len(MARKERS)], "zorder": 2}
            axes.plot(times, shares, lw=1.0, ms=4.5, ls=":", label=name, **style)
    plain = report["costs"].get(ALL_TOKENS, {}).get("all", {})
    axes.axhline(100, color="black", ls="--", lw=1)
    if "first_token_ms" in plain:
        label = f"{ALL_TOKENS} ({report['visual_tokens']})"
        axes.plot([plain["first_token_ms"]["median"]], [100], "k*", ms=13, label=label, zorder=4)
    clock = "processor time" if report.get("clock") == "cpu" else "time"
    axes.set_xlabel(f"{clock} to the first token, ms (median of alternating runs; bars: quartiles)")
    axes.set_ylabel("accuracy, % of all tokens (bars: 95% intervals)")
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    keeps = ", ".join(map(str, report["keeps"]))
    axes.set_title(f"{report['backbone']}: {report['rows']} questions, keep {keeps}", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path, format="png")


def _bars(report: dict[str, Any], name: str) -> list[tuple[float, float, Any, Any]]:
    out = []
    for keep, each in report["lines"][name]["budgets"].items():
        time = report["costs"].get(name, {}).get(keep, {}).get("first_token_ms")
        if time and "relative" in each:
            share = each["relative"]
            across = [[time["median"] - time["low"]], [time["high"] - time["median"]]]
            # The mean of seeds and the middle of a bootstrap need not agree to the last bit.
            along = [
                [max(0.0, 100 * (share - each["relative_low"]))],
                [max(0.0, 100 * (each["relative_high"] - share))],
            ]
            out.append((time["median"], 100 * share, across, along))
    return out
