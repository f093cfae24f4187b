"""``lit-reduce evaluate``: score a reducer on questions with answers and write the report."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_reduce import settings
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.data.jsonl import Row, read_rows
from lit_reduce.errors import UserError
from lit_reduce.evaluate.evaluator import Asked, Results, evaluate
from lit_reduce.files import check_writable
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.report.accuracy import text_table, write_report
from lit_reduce.settings import BackboneSettings, ReducerSettings
from lit_reduce.tokens import Budget

Named = Mapping[str, Callable[[int], Iterable[Row]]]
"""Questions that need no file, by the name that ``data`` takes: how many -> so many rows."""


@dataclass
class ScoreSettings:
    """What ``evaluate`` and ``compare`` have in common; their files in configs/ explain each setting."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    keep: Any = 64
    data: str | None = None
    out: str = "outputs/report.json"
    limit: int | None = None
    max_new_tokens: int = 32
    batch_size: int = 16
    runs: int = 5


@dataclass
class EvaluateSettings(ScoreSettings):
    """Settings of ``evaluate``; ``configs/evaluate.yaml`` explains each."""

    reducer: ReducerSettings = field(default_factory=ReducerSettings)


def run(chosen: EvaluateSettings, named: Named | None = None) -> None:
    """Score the reducer at every budget; writes JSON, Markdown, a plot and all answers, prints a table.

    Raises:
        UserError: A setting, the data, a picture or a plug-in is not usable.
    """
    keeps = check(chosen, ".json")
    plan = find_spec(chosen.reducer, keeps[0])
    plans = {} if plan.reducer is None else {plan.reducer.name: plan}
    rows, backbone = questions(chosen, named or {}), open_backbone(chosen)
    results, journal = score(chosen, backbone, plans, keeps, rows)
    out = Path(chosen.out)
    report = write_report(results, out)
    print(text_table(report), end="")
    finish(chosen, journal, [out, out.with_suffix(".md"), out.with_suffix(".png")])


def check(chosen: ScoreSettings, suffix: str) -> list[int | float]:
    """Refuse settings that cannot work before anything is read or loaded; returns the budgets.

    Raises:
        UserError: One of them cannot.
    """
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("runs", 0), ("limit", 1)):
        if getattr(chosen, name) is not None and getattr(chosen, name) < least:
            raise UserError(f"{name}={getattr(chosen, name)}: give {least} or more")
    keeps = [Budget.parse(keep).value for keep in (chosen.keep if isinstance(chosen.keep, list) else [chosen.keep])]
    if not keeps:
        raise UserError("keep=[] holds no budget: give one or more, as keep=[64,32]")
    if Path(chosen.out).suffix != suffix:
        raise UserError(f"out={chosen.out}: give the report a name that ends in {suffix}")
    check_writable(chosen.out)
    return list(dict.fromkeys(keeps))


def questions(chosen: ScoreSettings, named: Named) -> list[Row]:
    """The rows to score on: of a file, or of a set that is known by name.

    Raises:
        UserError: No data, a file that is not usable, or a row without an answer.
    """
    known = "".join(f", or data={name}" for name in named)
    if chosen.data is None:
        raise UserError(f"no data are given: write data=FILE.jsonl with image, prompt and answer in each line{known}")
    if chosen.data in named and not Path(chosen.data).exists():
        return list(named[chosen.data](chosen.limit or 500))
    if not Path(chosen.data).suffix and not Path(chosen.data).exists():
        raise UserError(f"data={chosen.data} is neither a file nor a known set ({', '.join(named) or 'none'})")
    return read_rows(chosen.data, need_answers=True)[: chosen.limit]


def open_backbone(chosen: ScoreSettings) -> Backbone:
    """The backbone that the settings name."""
    return load_backbone(chosen.backbone.name, chosen.backbone.dtype, chosen.backbone.device, chosen.backbone.revision)


def score(
    chosen: ScoreSettings,
    backbone: Backbone,
    plans: Mapping[str, ReducerSpec],
    keeps: list[int | float],
    rows: list[Row],
    tolerant: bool = False,
    known: Collection[Asked] = (),
) -> tuple[Results, Path]:
    """Ask all questions under all plans but what is known, with a progress bar; a killed run goes on where it stopped.

    Returns:
        What was found, and the journal that :func:`finish` puts beside the report.
    """
    journal = _journal(chosen, backbone, plans, keeps, known)
    if not tolerant:  # before there is a bar that an error would break into
        for plan, keep in product(plans.values(), keeps):
            replace(plan, keep=keep).check(backbone)
    with tqdm(total=len(rows), unit="row", desc="questions") as bar:
        results = evaluate(
            backbone, plans, keeps, rows, chosen.batch_size, bar.update, max_new_tokens=chosen.max_new_tokens,
            timing_runs=chosen.runs, journal=journal, tolerant=tolerant, known=known,
        )  # fmt: skip
    return results, journal


def finish(chosen: ScoreSettings, journal: Path, written: list[Path]) -> None:
    """Keep every answer and the settings beside a finished report, and say where all of it is."""
    out = Path(chosen.out)
    answers = out.with_suffix(".rows.jsonl")
    journal.replace(answers)
    settings.save(chosen, settings.beside(out))
    print(f"written: {', '.join(str(path) for path in [*written, answers])}")


def _journal(
    chosen: ScoreSettings, backbone: Backbone, plans: Mapping[str, ReducerSpec], keeps: list[int | float],
    known: Collection[Asked],
) -> Path:  # fmt: skip
    """Where the answers grow. Its name holds a digest of all that decides them, so no other run is ever continued."""
    made_by: list[Any] = [backbone.identity.hash, keeps, chosen.max_new_tokens, sorted(map(str, known))]
    for name, plan in plans.items():
        weights = None if plan.trained_for is None else plan.trained_for.weights_sha256
        made_by.append((name, plan.positions, weights, plan.reducer and (plan.reducer.name, plan.reducer.config)))
    digest = hashlib.sha256(repr(made_by).encode()).hexdigest()[:8]
    return Path(chosen.out).with_suffix(f".{digest}.part.jsonl")
