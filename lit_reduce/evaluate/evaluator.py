"""Accuracy of several plans at several budgets on the same questions, each picture encoded once for all of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.latency import Timing, first_token
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.inference.resumable_jsonl import answer_batch, answer_rows
from lit_reduce.inference.spec import ReducerSpec, generate, visual_counts
from lit_reduce.runtime import encode
from lit_reduce.runtime.encode import Encoded

ALL_TOKENS = "all tokens"
Asked = tuple[str, int | float | None]
"""A reducer's name and a budget; `ALL_TOKENS` and None for the plain backbone."""


@dataclass
class Score:
    """One reducer at one budget.

    Attributes:
        reducer: Its name; ``all tokens`` for the plain backbone.
        keep: The budget as asked for; None for all tokens.
        kept: Mean kept tokens of an image, as measured; of a method inside the language model, mean over its layers.
        counts: The same for each row; empty when it failed.
        correct: 1.0 or 0.0 for each row, in the order of the rows; empty when it failed.
        answers: The model's answers.
        timing: Time to the first token, when it was measured.
        error: Why there is nothing to score; None when all went well.
    """

    reducer: str
    keep: int | float | None
    kept: float = 0.0
    counts: list[float] = field(default_factory=list, kw_only=True)
    correct: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    timing: Timing | None = None
    error: str | None = None

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return sum(self.correct) / len(self.correct)


@dataclass
class Results:
    """What :func:`evaluate` found.

    Attributes:
        backbone: Its id.
        rows: How many questions were asked.
        tokens: Visual tokens of an image before reduction.
        scores: All tokens first, then every reducer at every budget; without what was left out.
        families: The kind of each question, in the order of the rows; None where it is not known.
    """

    backbone: str
    rows: int
    tokens: int
    scores: list[Score]
    families: list[str | None] = field(default_factory=list)

    def score(self, reducer: str, keep: int | float | None) -> Score:
        """The score of a reducer at a budget. Raises KeyError when it was not measured."""
        for score in self.scores:
            if (score.reducer, score.keep) == (reducer, keep):
                return score
        raise KeyError((reducer, keep))


def evaluate(
    backbone: Backbone,
    plans: Mapping[str, ReducerSpec],
    keeps: Sequence[int | float],
    rows: Iterable[Row],
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda _: None,
    *,
    max_new_tokens: int = 16,
    timing_runs: int = 0,
    journal: str | Path | None = None,
    tolerant: bool = False,
    known: Collection[Asked] = (),
) -> Results:
    """Ask every question with all tokens and with every plan at every budget.

    Args:
        backbone: The model.
        plans: What to compare, by the name for the report; the budgets of the plans themselves are not used.
        keeps: Budgets: tokens per image, or ratios.
        rows: Questions with answers; taken lazily when there is no journal, so they may be rendered on the way.
        batch_size: Questions at a time.
        on_batch: Called after each batch with its number of questions, for a progress bar.
        max_new_tokens: The longest answer.
        timing_runs: When above 0, time the first token of the first question this often for every plan.
        journal: A JSON-lines file that grows by a line a question; a run that was killed goes on after its last line.
        tolerant: A plan that fails becomes a score with its error, and the others go on; otherwise it stops the run.
        known: What is left out, because an earlier run asked it.

    Raises:
        UserError: No rows, a row without an answer, a budget above the token count, a damaged picture.
    """
    scores = [Score(ALL_TOKENS, None), *(Score(name, keep) for name in plans for keep in keeps)]
    scores = [score for score in scores if (score.reducer, score.keep) not in known]
    asked = {_key(score): _plan(plans, score) for score in scores}
    failed = Failures(tolerant)
    for key, plan in asked.items():
        with failed.of(key):
            plan.check(backbone)
    answers = partial(_answers, backbone, asked, failed, max_new_tokens)
    if journal is None:
        records, first = [], None
        for batch in _batches(rows, batch_size):
            first = first or batch[0]
            records += answer_batch(batch, answers)
            on_batch(len(batch))
    else:
        rows = list(rows)
        first = rows[0] if rows else None
        records, _ = answer_rows(rows, journal, answers, batch_size, on_batch)
    if first is None:
        raise UserError("there is nothing to evaluate: no rows were given")
    scores = [_filled(score, records) for score in scores]
    if timing_runs:
        inputs = backbone.prepare([first.open()], [first.prompt])
        sound = {_key(score): asked[_key(score)] for score in scores if score.error is None}
        timings = first_token(backbone, inputs, sound, timing_runs)
        scores = [replace(score, timing=timings.get(_key(score))) for score in scores]
    tokens = round(sum(record["visual_tokens"] for record in records) / len(records))
    return Results(backbone.identity.id, len(records), tokens, scores, [record.get("family") for record in records])


class Failures(dict[str, str]):
    """Which plans failed, and why; where failure is not tolerated, the error passes through instead."""

    def __init__(self, tolerant: bool) -> None:
        super().__init__()
        self.tolerant = tolerant

    @contextmanager
    def of(self, key: str) -> Iterator[None]:
        """An error inside the block is this plan's; all tokens may not fail, or there would be nothing to compare."""
        try:
            yield
        except Exception as error:
            if not self.tolerant or key == ALL_TOKENS:
                raise
            self[key] = reason(error)


def reason(error: Exception) -> str:
    """What went wrong, in one line; for other errors than our own their kind, which says more than their text."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _key(score: Score) -> str:
    return score.reducer if score.keep is None else f"{score.reducer} at {score.keep}"


def _plan(plans: Mapping[str, ReducerSpec], score: Score) -> ReducerSpec:
    return ReducerSpec() if score.keep is None else replace(plans[score.reducer], keep=score.keep)


def _answers(
    backbone: Backbone, plans: Mapping[str, ReducerSpec], failed: Failures, max_new_tokens: int, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """For every question what every plan answered and kept, or its error."""
    for row in rows:
        if row.answer is None:
            raise UserError(f"line {row.line}: a question without an answer cannot be scored")
    inputs = backbone.prepare([row.open() for row in rows], [row.prompt for row in rows])
    totals = visual_counts(backbone, inputs)
    records: list[dict[str, Any]] = [{"visual_tokens": total, "plans": {}} for total in totals]
    encoded = _encoded(backbone, inputs, plans, failed)
    for key, plan in plans.items():
        if key not in failed:
            with failed.of(key):
                texts, logical = generate(backbone, inputs, plan, max_new_tokens, encoded)
                kept = totals if logical is None else logical.per_layer
                for record, text, count in zip(records, texts, kept, strict=True):
                    record["plans"][key] = {"answer": text, "kept": count}
        if key in failed:
            for record in records:
                record["plans"][key] = {"error": failed[key]}
    return records


@torch.inference_mode()
def _encoded(
    backbone: Backbone, inputs: dict[str, Any], plans: Mapping[str, ReducerSpec], failed: Failures
) -> Encoded | None:
    """One pass of the tower for all plans; a plan whose signals this backbone cannot give fails alone."""
    wanted: dict[str, frozenset[str]] = {}
    for key, plan in plans.items():
        if plan.reducer and plan.shares_encoding and key not in failed:
            with failed.of(key):
                wanted[key] = plan.signals
    if not wanted:
        return None
    try:
        return encode(backbone.model, inputs, frozenset().union(*wanted.values()), backbone.family)
    except Exception:
        if not failed.tolerant:
            raise
    for key, signals in wanted.items():
        with failed.of(key):
            encode(backbone.model, inputs, signals, backbone.family)
    sound = [signals for key, signals in wanted.items() if key not in failed]
    return encode(backbone.model, inputs, frozenset().union(*sound), backbone.family) if sound else None


def _filled(score: Score, records: Sequence[dict[str, Any]]) -> Score:
    """The score of one plan, from the lines of all questions."""
    mine = [record["plans"][_key(score)] for record in records]
    for entry in mine:
        if "error" in entry:
            return replace(score, error=entry["error"])
    answers = [entry["answer"] for entry in mine]
    pairs = zip(answers, records, strict=True)
    correct = [float(is_correct(answer, record["expected"])) for answer, record in pairs]
    counts = [float(entry["kept"]) for entry in mine]
    return replace(score, kept=sum(counts) / len(counts), counts=counts, correct=correct, answers=answers)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator: Iterator[Any] = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
