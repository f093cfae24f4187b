"""What was measured as one table of accuracy by budget: as JSON, as text, as Markdown and as a plot."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_reduce.console import columns
from lit_reduce.evaluate.bootstrap import interval, ratio_interval
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Results, Score
from lit_reduce.files import atomic_path, write_atomic
from lit_reduce.report.plots import plot


def summary(results: Results) -> dict[str, Any]:
    """Everything measured, as plain data: the content of ``report.json``."""
    return {
        "backbone": results.backbone,
        "rows": results.rows,
        "visual_tokens": results.tokens,
        "families": dict(sorted(Counter(name for name in results.families if name is not None).items())),
        "interval": "95% percentile bootstrap over rows; relative: to all tokens, in pairs",
        "scores": [_entry(score, results) for score in results.scores],
    }


def _entry(score: Score, results: Results) -> dict[str, Any]:
    if score.error is not None:
        return {"reducer": score.reducer, "keep": score.keep, "error": score.error}
    correct = torch.tensor(score.correct, dtype=torch.float64)
    low, high = interval(correct)
    entry: dict[str, Any] = {"reducer": score.reducer, "keep": score.keep, "kept_tokens": score.kept}
    entry |= {"accuracy": correct.mean().item(), "low": low, "high": high}
    whole = torch.tensor(results.score(ALL_TOKENS, None).correct, dtype=torch.float64)
    if score.keep is not None and whole.any():
        low, high = ratio_interval(correct, whole)
        entry |= {"relative": (correct.mean() / whole.mean()).item(), "relative_low": low, "relative_high": high}
    if any(results.families):
        kinds = sorted({name for name in results.families if name is not None})
        entry["families"] = {kind: _share(score, results, kind) for kind in kinds}
    if len(set(score.counts)) > 1:
        entry |= {"kept_spread": statistics.pstdev(score.counts)}
        if any(results.families):
            entry["kept_families"] = {kind: _counts(score, results, kind) for kind in kinds}
    if score.timing is not None:
        entry |= {"ttft_ms": score.timing.median, "ttft_quartiles_ms": [score.timing.low, score.timing.high]}
        entry |= {"reducer_ms": score.timing.reducer_ms}
    return entry


def _share(score: Score, results: Results, kind: str) -> float:
    mine = [right for right, name in zip(score.correct, results.families, strict=True) if name == kind]
    return sum(mine) / len(mine)


def _counts(score: Score, results: Results, kind: str) -> dict[str, float]:
    mine = [count for count, name in zip(score.counts, results.families, strict=True) if name == kind]
    return {"mean": statistics.mean(mine), "spread": statistics.pstdev(mine)}


def markdown(report: dict[str, Any]) -> str:
    """The table of a summary in Markdown: one line a reducer, one column a budget, best of each column in bold."""
    keeps = budgets(report)
    entries = by_plan(report)
    lines = ["| reducer | " + " | ".join(f"keep {keep}" for keep in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for name in names(report):
        cells = []
        for keep in keeps:
            entry = entries[name, keep]
            text = "failed" if "error" in entry else f"{percent(entry)} {span(entry)}"
            cells.append(f"**{text}**" if is_best(report, entry) else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = entries.get((ALL_TOKENS, None))
    if whole is not None:
        text = f"{percent(whole)} {span(whole)}"
        lines.insert(2, f"| {ALL_TOKENS} ({report['visual_tokens']}) | " + " | ".join([text] * len(keeps)) + " |")
    return "\n".join(lines) + "\n"


def text_table(report: dict[str, Any]) -> str:
    """The same numbers for a terminal, one line for each reducer and budget; of what failed, the reason."""
    header = ("reducer", "keep", "accuracy %", "95% interval", "% of all tokens", "first token ms", "reducer ms")
    lines = []
    for entry in report["scores"]:
        keep = report["visual_tokens"] if entry["keep"] is None else entry["keep"]
        if "error" in entry:
            continue
        relative = f"{100 * entry['relative']:.1f}" if "relative" in entry else "-"
        time = f"{entry['ttft_ms']:.1f}" if "ttft_ms" in entry else "-"
        own = f"{entry['reducer_ms']:.2f}" if entry.get("reducer_ms") is not None else "-"
        lines.append((entry["reducer"], str(keep), percent(entry), span(entry), relative, time, own))
    further = [*uneven(report), *failures(report)]
    return columns(header, lines, right=range(1, 7)) + "".join(f"{line}\n" for line in further)


def uneven(report: dict[str, Any]) -> list[str]:
    """One line for every reducer and budget that kept more of some pictures than of others: which kinds got most."""
    lines = []
    for entry in report["scores"]:
        if "kept_spread" not in entry:
            continue
        kinds = sorted(entry.get("kept_families", {}).items(), key=lambda kind: -kind[1]["mean"])
        most = ", ".join(f"{name} {one['mean']:.1f} ± {one['spread']:.1f}" for name, one in kinds)
        kept = f"{entry['kept_tokens']:.1f} ± {entry['kept_spread']:.1f}"
        lines.append(f"{entry['reducer']} at {entry['keep']} kept {kept} tokens{': ' if most else ''}{most}")
    return lines


def failures(report: dict[str, Any]) -> list[str]:
    """One line for every reducer that failed, with the budgets and the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report["scores"]:
        if "error" in entry:
            reasons.setdefault((entry["reducer"], entry["error"]), []).append(str(entry["keep"]))
    return [f"{name} failed at {', '.join(keeps)}: {error}" for (name, error), keeps in reasons.items()]


def write_report(
    results: Results, path: str | Path, about: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write ``path`` (JSON) and, beside it, the same name with ``.md`` and ``.png``; returns the summary.

    ``about`` holds facts about the reducers that the report passes on.
    """
    path, report = Path(path), summary(results) | ({"reducers": dict(about)} if about else {})
    write_atomic(path, json.dumps(report, indent=2) + "\n")
    write_atomic(path.with_suffix(".md"), markdown(report))
    with atomic_path(path.with_suffix(".png")) as temporary:
        plot(report, temporary)
    return report


def names(report: dict[str, Any]) -> list[str]:
    """The reducers of a summary, in its order."""
    return list(dict.fromkeys(entry["reducer"] for entry in report["scores"] if entry["keep"] is not None))


def budgets(report: dict[str, Any]) -> list[Any]:
    """The budgets of a summary, in its order."""
    return list(dict.fromkeys(entry["keep"] for entry in report["scores"] if entry["keep"] is not None))


def by_plan(report: dict[str, Any]) -> dict[tuple[str, Any], dict[str, Any]]:
    """The entries of a summary by reducer and budget."""
    return {(entry["reducer"], entry["keep"]): entry for entry in report["scores"]}


def is_best(report: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether no other reducer scores more at this budget, at the precision of the tables."""
    rivals = [other for other in report["scores"] if other["keep"] == entry["keep"] and "error" not in other]
    return "error" not in entry and float(percent(entry)) == max(float(percent(other)) for other in rivals)


def percent(entry: dict[str, Any], name: str = "accuracy") -> str:
    """A share of an entry in percent."""
    return f"{100 * entry[name]:.1f}"


def span(entry: dict[str, Any], prefix: str = "") -> str:
    """The interval of a share in percent: ``[low, high]``."""
    return f"[{100 * entry[prefix + 'low']:.1f}, {100 * entry[prefix + 'high']:.1f}]"
