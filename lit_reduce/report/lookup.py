"""Looking things up in a summary: entries, the order of the reducers, the best of a column, what went wrong."""

import statistics
from typing import Any


def entries(report: dict[str, Any]) -> dict[tuple[str, Any], dict[str, Any]]:
    """The entries of a summary by reducer and budget."""
    return {(entry["reducer"], entry["keep"]): entry for entry in report["scores"]}


def ranked(report: dict[str, Any]) -> list[str]:
    """The reducers of a summary: trained ones first, the best on average first, those that failed last."""
    found = entries(report)

    def rank(name: str) -> tuple[bool, float]:
        mine = [found[name, keep] for keep in report["keeps"]]
        shares = [entry.get("relative", entry.get("accuracy", -1.0)) for entry in mine]
        return not report["reducers"][name].get("trained", False), -statistics.mean(shares)

    return sorted(report["reducers"], key=rank)


def middle_budget(report: dict[str, Any]) -> Any:
    """The budget that stands for all where only one is shown; None where there are none."""
    keeps = sorted(report["keeps"])
    return keeps[(len(keeps) - 1) // 2] if keeps else None


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


def failures(report: dict[str, Any]) -> list[str]:
    """One sentence for each reducer or seed that failed or was not timed, with the budgets and the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    untimed = []
    for entry in report["scores"]:
        wrong = {entry["reducer"]: entry["error"]} if "error" in entry else entry.get("errors", {})
        for name, error in wrong.items():
            reasons.setdefault((name, error), []).append(str(entry["keep"]))
        if "cost_error" in entry:
            untimed.append(f"{entry['reducer']} at {entry['keep']} was not timed: {entry['cost_error']}")
    return [f"{name} failed at {', '.join(keeps)}: {error}" for (name, error), keeps in reasons.items()] + untimed


def uneven_counts(report: dict[str, Any]) -> list[str]:
    """One sentence for each reducer and budget that kept more tokens of some images than of others."""
    lines = []
    for entry in report["scores"]:
        if "kept_spread" not in entry:
            continue
        kinds = sorted(entry.get("kept_families", {}).items(), key=lambda kind: -kind[1]["mean"])
        most = ", ".join(f"{name} {one['mean']:.1f} ± {one['spread']:.1f}" for name, one in kinds)
        kept = f"{entry['kept_tokens']:.1f} ± {entry['kept_spread']:.1f}"
        lines.append(f"{entry['reducer']} at {entry['keep']} kept {kept} tokens{': ' if most else ''}{most}")
    return lines
