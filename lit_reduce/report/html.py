"""The comparison as one self-contained HTML file, with tables, plot and pictures inside."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from lit_reduce.evaluate.results import ALL_TOKENS
from lit_reduce.report.lookup import entries, failures, is_best, percent, ranked, span
from lit_reduce.report.plots import plot

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 2.5rem auto; max-width: 76rem;
       padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p, .note { color: #5a6472; margin: .2rem 0 .8rem; } small { color: #5a6472; font-weight: normal; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; border-bottom: 1px solid #e4e8ee; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #c9d0da; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td small { display: block; font-size: .78rem; } td.best { font-weight: 700; } td.failed { color: #a3261b; }
.failed { color: #a3261b; } img.plot { width: 100%; max-width: 62rem; }
.example { margin: 1.2rem 0 2rem; } .panels { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 168px; } figure img, .blank { width: 168px; border-radius: 4px; display: block; }
.blank { height: 168px; background: #f0f2f5; color: #5a6472; display: grid; place-items: center; }
figcaption { font-size: .82rem; line-height: 1.3; margin-top: .25rem; overflow-wrap: anywhere; }
.right { color: #1a7a45; } .wrong { color: #a3261b; }
"""


@dataclass(frozen=True)
class Panel:
    """What one reducer kept of a picture, and what the model answered then.

    Attributes:
        name: The reducer.
        image: The picture with the dropped tokens dimmed; None where it cannot be painted.
        answer: The model's answer.
        right: Whether the answer is an accepted one.
    """

    name: str
    image: Image.Image | None
    answer: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One question with a panel for every reducer.

    Attributes:
        prompt: The question.
        expected: The accepted answer.
        panels: All tokens first.
    """

    prompt: str
    expected: str
    panels: list[Panel]


def html_report(report: dict[str, Any], examples: Sequence[Example], shown_at: int | float) -> str:
    """The HTML page of a summary, with some examples at the budget ``shown_at``."""
    whole = entries(report)[ALL_TOKENS, None]
    title = f"Visual-token reducers on {report['backbone']}"
    all_tokens = f"with all {report['visual_tokens']} visual tokens {percent(whole)} % {span(whole)} are answered right"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{report['rows']} questions; {all_tokens}. Brackets: 95 % bootstrap intervals.</p>",
        _accuracy(report),
        _failures(report),
        f'<h2>Accuracy against budget and time</h2><img class="plot" alt="plot" src="{_plot(report)}">',
        _times(report),
        _families(report),
        _gallery(examples, shown_at),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _accuracy(report: dict[str, Any]) -> str:
    """Relative accuracy, large, over the plain one; the tint follows what is lost."""
    keeps, found, lines = report["keeps"], entries(report), []
    for name in ranked(report):
        facts = report["reducers"][name]
        words = [facts.get("kind"), facts.get("site"), "trained" if facts.get("trained") else None]
        kind = ", ".join(word for word in words if word)
        first = f'{escape(name)}<small title="{escape(facts.get("paper", ""))}">{escape(kind)}</small>'
        lines.append((first, [_cell(report, found[name, keep]) for keep in keeps]))
    return (
        "<h2>Accuracy relative to all tokens</h2>"
        '<p class="note">Large: share of the accuracy with all tokens, in %, drawn in pairs. Small: accuracy itself. '
        "Bold: the best of a column.</p>" + _table(["reducer", *(f"keep {keep}" for keep in keeps)], lines)
    )


def _cell(report: dict[str, Any], entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f'<td class="failed" title="{escape(entry["error"])}">failed</td>'
    plain = f"{percent(entry)} {span(entry)}"
    if "relative" not in entry:
        return f"<td>{plain}</td>"
    strong = ' class="best"' if is_best(report, entry) else ""
    large = f"{percent(entry, 'relative')} {span(entry, 'relative_')}"
    return f"<td{strong}{_tint(entry['relative'])}>{large}<small>{plain}</small></td>"


def _tint(share: float) -> str:
    """White at half of the accuracy or less, green at all of it."""
    return f' style="background: rgba(46, 160, 98, {0.38 * min(1.0, max(0.0, 2 * share - 1)):.2f})"'


def _failures(report: dict[str, Any]) -> str:
    return "".join(f'<p class="failed">{escape(line)}</p>' for line in failures(report))


def _times(report: dict[str, Any]) -> str:
    """Median and quartiles to the first token; how many times faster than all tokens; the reducer's own share."""
    keeps, found = report["keeps"], entries(report)
    whole = found[ALL_TOKENS, None]
    if "first_token_ms" not in whole:
        return ""

    def cell(entry: dict[str, Any]) -> str:
        if "first_token_ms" not in entry:
            return "<td>-</td>"
        time = entry["first_token_ms"]
        own = f", own {entry['reducer_ms']['median']:.1f}" if "reducer_ms" in entry else ""
        ratio = whole["first_token_ms"]["median"] / time["median"]
        faster = f"<small>{ratio:.2f} x{own}</small>" if entry is not whole else ""
        return f"<td>{time['median']:.0f} [{time['low']:.0f}, {time['high']:.0f}]{faster}</td>"

    lines = [(ALL_TOKENS, [cell(whole)] * len(keeps))]
    lines += [(escape(name), [cell(found[name, keep]) for keep in keeps]) for name in ranked(report)]
    return (
        "<h2>Time to the first token, ms</h2>"
        '<p class="note">Median [quartiles] of alternating runs on the first question, with encoding, the reducer and '
        "prefill. Small: how many times faster than all tokens, and the reducer's own time.</p>"
        + _table(["reducer", *(f"keep {keep}" for keep in keeps)], lines)
    )


def _families(report: dict[str, Any]) -> str:
    """One table a budget, one column a kind of question."""
    kinds, found = report["families"], entries(report)
    if not kinds:
        return ""
    whole = found[ALL_TOKENS, None]

    def cells(entry: dict[str, Any]) -> list[str]:
        made = []
        for kind in kinds:
            share, most = entry["families"][kind], whole["families"][kind]
            made.append(f"<td{_tint(share / most) if most else ''}>{100 * share:.1f}</td>")
        return made

    header = ["reducer", *(f"{escape(kind)} <small>{count}</small>" for kind, count in kinds.items())]
    out = ["<h2>Accuracy by kind of question, %</h2>"]
    for keep in report["keeps"]:
        sound = [name for name in ranked(report) if "error" not in found[name, keep]]
        lines = [(ALL_TOKENS, cells(whole)), *((escape(name), cells(found[name, keep])) for name in sound)]
        out.append(f'<p class="note">keep {keep}</p>{_table(header, lines)}')
    return "".join(out)


def _gallery(examples: Sequence[Example], shown_at: int | float) -> str:
    if not examples:
        return ""
    out = [f"<h2>What each kept at {shown_at}</h2>"]
    for example in examples:
        panels = "".join(_panel(panel) for panel in example.panels)
        question = f"{escape(example.prompt)} <small>expected: {escape(example.expected)}</small>"
        out.append(f'<div class="example"><h3>{question}</h3><div class="panels">{panels}</div></div>')
    return "".join(out)


def _panel(panel: Panel) -> str:
    image = '<div class="blank">no picture</div>'
    if panel.image is not None:
        image = f'<img alt="{escape(panel.name)}" src="{_jpeg(panel.image)}">'
    verdict = ("right", "&#10003;") if panel.right else ("wrong", "&#10007;")
    answer = f'<span class="{verdict[0]}">{verdict[1]} {escape(panel.answer)}</span>'
    return f"<figure>{image}<figcaption><b>{escape(panel.name)}</b><br>{answer}</figcaption></figure>"


def _table(header: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """``lines`` hold a first cell and ready ``<td>`` elements."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    rows = "".join(f"<tr><td>{first}</td>{''.join(cells)}</tr>\n" for first, cells in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _jpeg(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((336, 336))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plot(report: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    plot(report, buffer)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
