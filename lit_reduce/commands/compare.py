"""``lit-reduce compare``: reducers side by side in one page, with pictures of what each kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lit_reduce.backbones import Backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Results, Score
from lit_reduce.evaluate.run import Named, ScoreSettings, check, finish, open_backbone, questions, score
from lit_reduce.files import write_atomic
from lit_reduce.inference.spec import ReducerSpec, find_spec, generate, visual_counts
from lit_reduce.reducer import available
from lit_reduce.report.accuracy import text_table, write_report
from lit_reduce.report.html import Example, Panel, page
from lit_reduce.report.model_view import seen
from lit_reduce.report.overlay import overlay, paintable
from lit_reduce.settings import ReducerSettings


@dataclass
class CompareSettings(ScoreSettings):
    """Settings of ``compare``; ``configs/compare.yaml`` explains each."""

    reducers: list[Any] = field(default_factory=lambda: ["all"])
    pictures: int = 4
    pictures_keep: Any = None


def compare(chosen: CompareSettings, named: Named | None = None) -> None:
    """Score all reducers at every budget on the same questions; writes a page, JSON, Markdown, a plot and all answers.

    A reducer that fails becomes a line with its reason, and the others go on.

    Raises:
        UserError: A setting, the data, a picture or a reducer's name is not usable.
    """
    keeps = check(chosen, ".html")
    if chosen.pictures < 0:
        raise UserError(f"pictures={chosen.pictures}: give 0 or more")
    shown_at = chosen.pictures_keep if chosen.pictures_keep is not None else sorted(keeps)[(len(keeps) - 1) // 2]
    if shown_at not in keeps:
        raise UserError(f"pictures_keep={shown_at} is not among keep={keeps}")
    plans, broken = find_specs(chosen.reducers, keeps[0])
    rows, backbone = questions(chosen, named or {}), open_backbone(chosen)
    results, journal = score(chosen, backbone, plans, keeps, rows, tolerant=True)
    results.scores += [Score(name, keep, error=error) for name, error in broken.items() for keep in keeps]
    out = Path(chosen.out)
    report = write_report(results, out.with_suffix(".json"), {name: about(plan) for name, plan in plans.items()})
    examples = gallery(backbone, plans, results, rows, chosen.pictures, shown_at)
    write_atomic(out, page(report, examples, shown_at))
    print(text_table(report), end="")
    finish(chosen, journal, [out.with_suffix(suffix) for suffix in (".html", ".json", ".md", ".png")])


def find_specs(entries: Sequence[Any], keep: int | float) -> tuple[dict[str, ReducerSpec], dict[str, str]]:
    """The plans that the user listed, and of plug-ins that do not load the reasons, both by the name for the report.

    Args:
        entries: Names, folders and hub ids; ``all`` for every reducer that needs no training; or mappings with
            ``name``, ``options`` and ``revision``.
        keep: Any of the budgets.

    Raises:
        UserError: No entry, an unknown name, unknown options, or the same reducer twice.
    """
    wanted = list(chain.from_iterable(_settings(entry) for entry in entries))
    if not wanted:
        raise UserError("reducers=[] names none: give names of lit-reduce list, folders of plug-ins, or all")
    plans: dict[str, ReducerSpec] = {}
    broken: dict[str, str] = {}
    for settings in wanted:
        word = "/" not in settings.name and not Path(settings.name).exists()
        try:
            plan = find_spec(settings, keep)
        except UserError as error:
            if word or settings.name in available():  # a slip of the keyboard, not a failure: say so now
                raise
            broken[settings.name] = str(error)
            continue
        if plan.reducer is None:
            raise UserError("reducers holds none, but all tokens are always compared: leave it out")
        options = ", ".join(f"{key}={value}" for key, value in settings.options.items())
        short = f"{plan.reducer.name} ({options})" if options else plan.reducer.name
        label = short if short not in plans else settings.name
        if label in plans:
            raise UserError(f"reducers names {label} twice: leave one out")
        plans[label] = plan
    return plans, broken


def _settings(entry: Any) -> list[ReducerSettings]:
    if entry == "all":
        return [ReducerSettings(name) for name, cls in available().items() if not cls.trained]
    if isinstance(entry, str):
        return [ReducerSettings(entry)]
    known = [each.name for each in fields(ReducerSettings)]
    if isinstance(entry, Mapping) and "name" in entry and set(entry) <= set(known):
        return [ReducerSettings(**{str(key): value for key, value in entry.items()})]
    raise UserError(f"reducers holds {entry!r}: give a name, a folder, or {{name: ..., options: {{...}}}}")


def about(plan: ReducerSpec) -> dict[str, Any]:
    """What a reader of the report wants to know about a reducer."""
    reducer = plan.reducer
    if reducer is None:
        return {}
    facts = {"kind": reducer.kind, "site": reducer.site, "signals": sorted(reducer.signals)}
    return facts | {"trained": reducer.trained, "paper": reducer.paper}


def examples_of(rows: Sequence[Row], count: int) -> list[int]:
    """Indices of rows to show: the kinds of questions in turn, each in the order of the file."""
    kinds: dict[str | None, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(row.family, []).append(index)
    turns = chain.from_iterable(zip_longest(*kinds.values()))
    return [index for index in turns if index is not None][:count]


def gallery(
    backbone: Backbone,
    plans: Mapping[str, ReducerSpec],
    results: Results,
    rows: Sequence[Row],
    count: int,
    keep: int | float,
) -> list[Example]:
    """Some questions with what every reducer kept of the picture at one budget, and what it answered."""
    made = []
    for index in examples_of(rows, count):
        row = rows[index]
        inputs = backbone.prepare([row.open()], [row.prompt])
        picture, total = seen(backbone, inputs, row.open()), visual_counts(backbone, inputs)[0]
        whole = results.score(ALL_TOKENS, None)
        panels = [Panel(ALL_TOKENS, picture, whole.answers[index], bool(whole.correct[index]))]
        for name, plan in plans.items():
            score = results.score(name, keep)
            if score.error is None:
                _, logical = generate(backbone, inputs, ReducerSpec(plan.reducer, keep, plan.positions), 1)
                painted = None
                if logical is not None and logical.grids and paintable(logical.grids[0], total):
                    painted = overlay(picture, logical.grids[0], total, logical.kept_indices[0].tolist(), shortest=336)
                panels.append(Panel(name, painted, score.answers[index], bool(score.correct[index])))
        expected = row.answer if isinstance(row.answer, list) else [row.answer or ""]
        made.append(Example(row.prompt, " / ".join(expected), panels))
    return made
