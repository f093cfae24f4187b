"""The table's numbers: several seeds of a method in one line, with what questions and what seeds leave open."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_reduce.evaluate.bootstrap import interval, ratio_interval
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Results
from lit_reduce.report.accuracy import percent, span

Lines = dict[str, dict[str, Any]]
"""By the name of a line what is known of it: ``plans`` (names in the results, one a seed), ``trained``, ``errors``."""


def summary(results: Results, lines: Lines, keeps: Sequence[int | float]) -> dict[str, Any]:
    """Accuracy of all tokens, and of every line at every budget, as plain data."""
    whole = torch.tensor(results.score(ALL_TOKENS, None).correct, dtype=torch.float64)
    low, high = interval(whole)
    return {
        "backbone": results.backbone,
        "rows": results.rows,
        "visual_tokens": results.tokens,
        "keeps": list(keeps),
        "families": dict(sorted(Counter(name for name in results.families if name is not None).items())),
        "interval": "95% percentile bootstrap over questions of the mean over seeds; relative: to all tokens",
        "spread": "sample standard deviation over seeds of the relative accuracy",
        "whole": {"accuracy": whole.mean().item(), "low": low, "high": high, "families": _families(whole, results)},
        "lines": {
            name: line | {"budgets": {str(keep): cell(results, line, keep) for keep in keeps}}
            for name, line in lines.items()
        },
    }


def cell(results: Results, line: dict[str, Any], keep: int | float) -> dict[str, Any]:
    """One line at one budget: the mean over its sound seeds, or an ``error``."""
    scores = [results.score(name, keep) for name in line["plans"]]
    failed = {score.reducer: score.error for score in scores if score.error is not None}
    sound = [score for score in scores if score.error is None]
    errors = line.get("errors", {}) | failed
    if not sound:
        return {"error": "; ".join(dict.fromkeys(errors.values())) or "nothing was scored"}
    correct = torch.tensor([score.correct for score in sound], dtype=torch.float64)
    whole = torch.tensor(results.score(ALL_TOKENS, None).correct, dtype=torch.float64)
    mean = correct.mean(0)
    found: dict[str, Any] = {"seeds": len(sound), "kept_tokens": statistics.mean(score.kept for score in sound)}
    found |= {"accuracy": mean.mean().item(), "families": _families(mean, results)}
    if whole.any():
        low, high = ratio_interval(mean, whole)
        each = (correct.mean(1) / whole.mean()).tolist()
        found |= {"relative": statistics.mean(each), "relative_low": low, "relative_high": high, "each": each}
        found |= {"spread": statistics.stdev(each)} if len(each) > 1 else {}
    return found | ({"errors": errors} if errors else {})


def _families(correct: torch.Tensor, results: Results) -> dict[str, float]:
    kinds = sorted({name for name in results.families if name is not None})
    return {
        kind: correct[torch.tensor([name == kind for name in results.families])].mean().item() for kind in kinds
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """Three tables: accuracy relative to all tokens, time and FLOPs, kinds of questions; and what failed."""
    whole = report["whole"]
    head = (
        f"{report['backbone']}: {report['rows']} questions, {percent(whole)} % {span(whole)} right with all "
        f"{report['visual_tokens']} visual tokens."
    )
    at = sorted(report["keeps"])[(len(report["keeps"]) - 1) // 2]
    parts = [
        head,
        "Accuracy relative to all tokens in %, [95 % interval over questions] ± standard deviation over seeds; bold: "
        "the best of a column.\n\n" + _table(["reducer", "seeds", "weights"], report, _accuracy(report), _facts),
        f"Time to the first token in ms ({report.get('clock', 'wall')} clock), median of alternating runs on one "
        "question, and GFLOPs up to it "
        f"({_cost(report['costs'][ALL_TOKENS]['all'])} with all tokens).\n\n"
        + _table(["reducer"], report, lambda name, keep: _cost(report["costs"].get(name, {}).get(str(keep), {}))),
    ]
    if report["families"]:
        parts.append(f"Accuracy by kind of question at {at}, %.\n\n" + _kinds(report, str(at)))
    if failures := missed(report):
        parts.append("\n".join(f"- {line}" for line in failures))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def missed(report: dict[str, Any]) -> list[str]:
    """A line for every plug-in that is missing or failed."""
    out: dict[str, None] = {}
    for name, line in report["lines"].items():
        for each in line["budgets"].values():
            for what, error in each.get("errors", line.get("errors") or {name: each.get("error")}).items():
                out |= {f"{what}: {error}": None} if error else {}
        for keep, cost in report["costs"].get(name, {}).items():
            out |= {f"{name} at {keep} was not timed: {cost['error']}": None} if "error" in cost else {}
    return list(out)


def ranked(report: dict[str, Any]) -> list[str]:
    """Trained lines first, then yardsticks; the best on average first, those that failed last."""

    def rank(name: str) -> tuple[bool, float]:
        line = report["lines"][name]
        shares = [each.get("relative", -1.0) for each in line["budgets"].values()]
        return not line["trained"], -statistics.mean(shares)

    return sorted(report["lines"], key=rank)


def _accuracy(report: dict[str, Any]) -> Callable[[str, Any], str]:
    def text(name: str, keep: Any) -> str:
        each = report["lines"][name]["budgets"][str(keep)]
        if "error" in each:
            return "missing" if not report["lines"][name]["plans"] else "failed"
        if "relative" not in each:
            return percent(each)
        others = [line["budgets"][str(keep)].get("relative", 0.0) for line in report["lines"].values()]
        shown = percent(each, "relative")
        shown = f"**{shown}**" if float(shown) >= max(round(100 * other, 1) for other in others) else shown
        tail = f" ± {percent(each, 'spread')}" if "spread" in each else ""
        return f"{shown} {span(each, 'relative_')}{tail}"

    return text


def _facts(line: dict[str, Any]) -> list[str]:
    if not line["trained"]:
        return ["", "0"]
    size = f"{line['parameters'] / 1000:.0f} k, {line['bytes'] / 1e6:.1f} MB" if "parameters" in line else "-"
    return [str(len(line["plans"])), size]


def _cost(cost: dict[str, Any]) -> str:
    if "first_token_ms" not in cost:
        return "-" if "flops" not in cost else f"{cost['flops']['first_token'] / 1e9:.2f} GFLOPs"
    return f"{cost['first_token_ms']['median']:.0f} ({cost['flops']['first_token'] / 1e9:.2f})"


def _table(
    head: list[str],
    report: dict[str, Any],
    text: Callable[[str, Any], str],
    facts: Callable[[dict[str, Any]], list[str]] = lambda _: [],
) -> str:
    head = [*head, *(f"keep {keep}" for keep in report["keeps"])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ranked(report):
        cells = [*facts(report["lines"][name]), *(text(name, keep) for keep in report["keeps"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kinds(report: dict[str, Any], keep: str) -> str:
    kinds = list(report["families"])
    lines = ["| reducer | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    rows = {ALL_TOKENS: report["whole"]} | {name: report["lines"][name]["budgets"][keep] for name in ranked(report)}
    for name, each in rows.items():
        if "families" in each:
            lines.append(f"| {name} | " + " | ".join(f"{100 * each['families'][kind]:.1f}" for kind in kinds) + " |")
    return "\n".join(lines)
