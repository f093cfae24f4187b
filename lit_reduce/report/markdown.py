"""The Markdown of a report: accuracy, accuracy relative to all tokens, time, kinds of questions, what went wrong."""

from collections.abc import Callable, Sequence
from typing import Any

from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.report.lookup import entries, failures, is_best, middle_budget, percent, ranked, span, uneven_counts

Cell = Callable[[dict[str, Any]], str]


def markdown(report: dict[str, Any]) -> str:
    """Write a summary as Markdown; its tables line up in a terminal too. A part without figures is left out."""
    whole = entries(report)[ALL_TOKENS, None]
    head = f"{report['backbone']}: {report['rows']} questions, {percent(whole)} % {span(whole)} right with all "
    parts = [f"{head}{report['visual_tokens']} visual tokens."]
    if report["keeps"]:
        parts.append("Accuracy in %; bold: the best of a column.\n\n" + _by_budget(report, _accuracy(report), whole))
    if any("relative" in entry for entry in report["scores"]):
        parts.append(_relative(report))
    if any("first_token_ms" in entry or "flops" in entry for entry in report["scores"]):
        parts.append(_times(report))
    if report["families"] and report["keeps"]:
        parts.append(_kinds(report))
    if notes := [*uneven_counts(report), *failures(report)]:
        parts.append("\n".join(f"- {line}" for line in notes))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(3, *(len(row[place]) for row in (header, *rows))) for place in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _by_budget(report: dict[str, Any], cell: Cell, whole: dict[str, Any] | None = None) -> str:
    """A row for each reducer and a column for each budget; above them all tokens, the same in each column."""
    keeps, found = report["keeps"], entries(report)
    rows = [[name, *(cell(found[name, keep]) for keep in keeps)] for name in ranked(report)]
    if whole is not None:
        rows.insert(0, [f"{ALL_TOKENS} ({report['visual_tokens']})", *[cell(whole)] * len(keeps)])
    return markdown_table(["reducer", *(f"keep {keep}" for keep in keeps)], rows)


def _accuracy(report: dict[str, Any]) -> Cell:
    def cell(entry: dict[str, Any]) -> str:
        if "error" in entry:
            return "failed" if report["reducers"][entry["reducer"]]["seeds"] else "missing"
        best = entry["keep"] is not None and is_best(report, entry)
        return f"**{percent(entry)}**" if best else percent(entry)

    return cell


def _relative(report: dict[str, Any]) -> str:
    """Relative accuracy with its interval; where there are trained reducers, their seeds and weights as well."""

    def cell(entry: dict[str, Any]) -> str:
        if "relative" not in entry:
            return "-"
        tail = f" ± {percent(entry, 'spread')}" if "spread" in entry else ""
        return f"{percent(entry, 'relative')} {span(entry, 'relative_')}{tail}"

    keeps, found = report["keeps"], entries(report)
    facts = {name: _facts(report["reducers"][name]) for name in ranked(report)}
    trained = any(one.get("trained") for one in report["reducers"].values())
    rows = [[name, *(facts[name] if trained else ()), *(cell(found[name, keep]) for keep in keeps)] for name in facts]
    several = " ± standard deviation over seeds" if any("spread" in entry for entry in report["scores"]) else ""
    header = ["reducer", *(("seeds", "weights") if trained else ()), *(f"keep {keep}" for keep in keeps)]
    table = markdown_table(header, rows)
    return f"Accuracy relative to all tokens in %, [95 % interval over questions]{several}.\n\n{table}"


def _facts(facts: dict[str, Any]) -> list[str]:
    if not facts.get("trained"):
        return ["-", "0"]
    size = f"{facts['parameters'] / 1000:.0f} k" if "parameters" in facts else "-"
    return [str(len(facts["seeds"])), size + (f", {facts['bytes'] / 1e6:.1f} MB" if "bytes" in facts else "")]


def _times(report: dict[str, Any]) -> str:
    """Median and quartiles to the first token, the reducer's own time, and FLOPs."""

    def cell(entry: dict[str, Any]) -> str:
        parts = []
        if "first_token_ms" in entry:
            time = entry["first_token_ms"]
            parts.append(f"{time['median']:.1f} [{time['low']:.1f}, {time['high']:.1f}]")
        if entry.get("reducer_ms", {}).get("median"):
            parts.append(f"own {entry['reducer_ms']['median']:.1f}")
        if "flops" in entry:
            parts.append(f"{entry['flops']['first_token'] / 1e9:.2f} GFLOPs")
        return ", ".join(parts) or "-"

    whole = entries(report)[ALL_TOKENS, None]
    if not report["keeps"]:
        return f"First token with all tokens, ms: {cell(whole)}."
    flops = ", and FLOPs up to it" if "flops" in whole else ""
    words = (
        f"Time to the first token in ms ({report.get('clock', 'wall')} clock): median [quartiles] of alternating runs "
        f"on one question, the reducer's own time in it{flops}."
    )
    return f"{words}\n\n{_by_budget(report, cell, whole)}"


def _kinds(report: dict[str, Any]) -> str:
    """Accuracy by kind of question at the middle budget."""
    keep, kinds, found = middle_budget(report), list(report["families"]), entries(report)
    named = {ALL_TOKENS: found[ALL_TOKENS, None]} | {name: found[name, keep] for name in ranked(report)}
    rows = [
        [name, *(percent(entry["families"], kind) for kind in kinds)]
        for name, entry in named.items()
        if "families" in entry
    ]
    return f"Accuracy by kind of question at {keep}, %.\n\n{markdown_table(['reducer', *kinds], rows)}"
