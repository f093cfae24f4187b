"""The summary of a report as plain data: one entry for each reducer and budget, whether of one seed or of several."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_reduce.evaluate.bootstrap import interval, ratio_interval
from lit_reduce.evaluate.results import ALL_TOKENS, Results, Score
from lit_reduce.inference.spec import ReducerSpec

Costs = Mapping[tuple[str, int | float | None], Mapping[str, Any]]
"""Measured figures by reducer and budget, as :func:`lit_reduce.benchmark.costs.measure_costs` returns them."""


@dataclass
class Line:
    """One reducer of a report: the seeds that are averaged, and what is known about it.

    Attributes:
        seeds: Names in the results, one for each seed.
        errors: Reasons why seeds could not be loaded, by name.
        facts: What a reader wants to know: see :func:`facts`.
    """

    seeds: list[str]
    errors: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def facts(spec: ReducerSpec) -> dict[str, Any]:
    """Kind, site, signals, source and number of weights of a reducer."""
    reducer = spec.reducer
    if reducer is None:
        return {}
    found = {"kind": reducer.kind, "site": reducer.site, "signals": sorted(reducer.signals), "paper": reducer.paper}
    return found | {"trained": reducer.trained, "parameters": sum(weight.numel() for weight in reducer.parameters())}


def summary(
    results: Results,
    lines: Mapping[str, Line] | None = None,
    keeps: Sequence[int | float] | None = None,
    costs: Costs | None = None,
) -> dict[str, Any]:
    """Summarise results: the content of ``report.json``.

    Args:
        results: The scores of all seeds of all reducers.
        lines: Which scores belong together; by default each reducer of the results is a line of one seed.
        keeps: The budgets; by default those of the results.
        costs: Figures to add to the entries.

    Returns:
        ``scores`` holds one entry for each reducer and budget. Its accuracy is the mean over seeds; ``each`` and
        ``spread`` say how the seeds differ. An entry without a sound seed has an ``error`` instead.
    """
    found = dict.fromkeys(score.reducer for score in results.scores if score.keep is not None)
    lines = {name: Line([name]) for name in found} if lines is None else lines
    if keeps is None:
        keeps = list(dict.fromkeys(score.keep for score in results.scores if score.keep is not None))
    asked = [(ALL_TOKENS, None, Line([ALL_TOKENS])), *((n, keep, line) for n, line in lines.items() for keep in keeps)]
    return {
        "backbone": results.backbone,
        "rows": results.rows,
        "visual_tokens": results.tokens,
        "keeps": list(keeps),
        "families": dict(sorted(Counter(name for name in results.families if name is not None).items())),
        "interval": "95% percentile bootstrap over rows of the mean over seeds; relative: to all tokens, in pairs",
        "spread": "sample standard deviation over seeds of the relative accuracy",
        "reducers": {name: line.facts | {"seeds": line.seeds} for name, line in lines.items()},
        "scores": [
            {"reducer": name, "keep": keep} | entry(results, line, keep) | dict((costs or {}).get((name, keep), {}))
            for name, keep, line in asked
        ],
    }


def entry(results: Results, line: Line, keep: int | float | None) -> dict[str, Any]:
    """One line at one budget: figures of the mean over its sound seeds, or an ``error``."""
    scores = [results.score(name, keep) for name in line.seeds]
    sound = [score for score in scores if score.error is None]
    errors = line.errors | {score.reducer: score.error for score in scores if score.error is not None}
    if not sound:
        return {"error": "; ".join(dict.fromkeys(errors.values())) or "nothing was scored"}
    correct = torch.tensor([score.correct for score in sound], dtype=torch.float64)
    mean = correct.mean(0)
    low, high = interval(mean)
    found: dict[str, Any] = {"seeds": len(sound), "kept_tokens": statistics.mean(score.kept for score in sound)}
    found |= {"accuracy": mean.mean().item(), "low": low, "high": high}
    if keep is not None:
        found |= _relative(correct, results)
    if any(results.families):
        found["families"] = {kind: mean[mine].mean().item() for kind, mine in _kinds(results).items()}
    return found | _counts(sound, results) | _timing(sound[0]) | ({"errors": errors} if errors else {})


def _relative(correct: Tensor, results: Results) -> dict[str, Any]:
    """Accuracy of seeds ``[S, n]`` relative to all tokens; nothing where all tokens answer nothing right."""
    whole = torch.tensor(results.score(ALL_TOKENS, None).correct, dtype=torch.float64)
    if not whole.any():
        return {}
    low, high = ratio_interval(correct.mean(0), whole)
    each = (correct.mean(1) / whole.mean()).tolist()
    found = {"relative": statistics.mean(each), "relative_low": low, "relative_high": high, "each": each}
    return found | ({"spread": statistics.stdev(each)} if len(each) > 1 else {})


def _counts(sound: Sequence[Score], results: Results) -> dict[str, Any]:
    """How the kept tokens differ between images, by kind of question; nothing where all are equal."""
    if not all(score.counts for score in sound):
        return {}
    counts = torch.tensor([score.counts for score in sound], dtype=torch.float64).mean(0)
    if len(set(counts.tolist())) == 1:
        return {}
    found: dict[str, Any] = {"kept_spread": counts.std(correction=0).item()}
    kinds = {kind: counts[mine] for kind, mine in _kinds(results).items()}
    kinds_found = {kind: {"mean": x.mean().item(), "spread": x.std(correction=0).item()} for kind, x in kinds.items()}
    return found | ({"kept_families": kinds_found} if kinds_found else {})


def _kinds(results: Results) -> dict[str, Tensor]:
    """Which rows are of each kind of question."""
    kinds = sorted({name for name in results.families if name is not None})
    return {kind: torch.tensor([name == kind for name in results.families]) for kind in kinds}


def _timing(score: Score) -> dict[str, Any]:
    """The measured times of the first sound seed: they do not depend on the weights."""
    if score.timing is None:
        return {}
    own = score.timing.reducer
    found = {"first_token_ms": score.timing.first_token._asdict()}
    return found | ({} if own is None else {"reducer_ms": own._asdict()})
