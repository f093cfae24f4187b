"""Accuracy of several reducers at several budgets on the same questions; each image is encoded once for all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.latency import first_token
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError, one_line
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.evaluate.results import ALL_TOKENS, Results, Score
from lit_reduce.inference.answer_store import AnswerStore
from lit_reduce.inference.resumable_jsonl import question_fields
from lit_reduce.inference.spec import ReducerSpec, generate, visual_counts
from lit_reduce.runtime import encode
from lit_reduce.runtime.encode import Encoded


def evaluate(
    backbone: Backbone,
    specs: Mapping[str, ReducerSpec],
    keeps: Sequence[int | float],
    rows: Iterable[Row],
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda _: None,
    *,
    max_new_tokens: int = 16,
    timing_runs: int = 0,
    store: AnswerStore | None = None,
    tolerant: bool = False,
) -> Results:
    """Ask every question with all tokens and with every reducer at every budget.

    Args:
        backbone: The model.
        specs: What to compare, by the name for the report; the budgets of the specs themselves are not used.
        keeps: Budgets: tokens per image, or ratios.
        rows: Questions with answers; taken lazily, so they may be rendered on the way.
        batch_size: Questions at a time.
        on_batch: Called after each batch with its number of questions, for a progress bar.
        max_new_tokens: The longest answer.
        timing_runs: When above 0, time the first token of the first question this often for every reducer and budget.
        store: Answers of earlier runs: what is there is not asked again, what is missing is added.
        tolerant: A reducer that fails becomes a score with its error, and the others go on; otherwise it stops the run.

    Raises:
        UserError: No rows, a row without an answer, a budget above the token count, a damaged picture.
    """
    scores = [Score(ALL_TOKENS, None), *(Score(name, keep) for name in specs for keep in keeps)]
    asked = {
        score.label: ReducerSpec() if score.keep is None else replace(specs[score.reducer], keep=score.keep)
        for score in scores
    }
    run = _Run(backbone, asked, Failures(tolerant), max_new_tokens, store)
    for label, spec in asked.items():
        with run.failed.of(label):
            spec.check(backbone)
    records: list[dict[str, Any]] = []
    first = None
    for batch in _batches(rows, batch_size):
        first = first or batch[0]
        records += run.answer(batch)
        on_batch(len(batch))
    if first is None:
        raise UserError("there is nothing to evaluate: no rows were given")
    scores = [_filled(score, records) for score in scores]
    if timing_runs:
        inputs = backbone.prepare([first.open()], [first.prompt])
        sound = {score.label: asked[score.label] for score in scores if score.error is None}
        timings = first_token(backbone, inputs, sound, timing_runs)
        scores = [replace(score, timing=timings.get(score.label)) for score in scores]
    tokens = round(sum(record["answers"][ALL_TOKENS]["kept"] for record in records) / len(records))
    families = [record.get("family") for record in records]
    return Results(backbone.identity.id, len(records), tokens, scores, families, records)


class Failures(dict[str, str]):
    """The reducers that failed, with the reasons; where failure is not tolerated, the error passes through instead."""

    def __init__(self, tolerant: bool) -> None:
        super().__init__()
        self.tolerant = tolerant

    @contextmanager
    def of(self, label: str) -> Iterator[None]:
        """Note an error inside the block; all tokens may not fail, or there would be nothing to compare with."""
        try:
            yield
        except Exception as error:
            if not self.tolerant or label == ALL_TOKENS:
                raise
            self[label] = one_line(error)


@dataclass
class _Run:
    """Answers batches of questions, each with all reducers and budgets.

    Attributes:
        backbone: The model.
        specs: All reducers and budgets, by label.
        failed: Those that failed so far; they are not asked any more.
        max_new_tokens: The longest answer.
        store: Answers of earlier runs.
    """

    backbone: Backbone
    specs: Mapping[str, ReducerSpec]
    failed: Failures
    max_new_tokens: int
    store: AnswerStore | None

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """For every question its fields, and what every reducer answered and kept, or its error."""
        for row in rows:
            if row.answer is None:
                raise UserError(f"line {row.line}: a question without an answer cannot be scored")
        found: dict[str, list[dict[str, Any]]] = {}
        if self.store is not None:
            for label, spec in self.specs.items():
                if label not in self.failed and (known := self.store.find(label, spec, rows)) is not None:
                    found[label] = known
        missing = {label: spec for label, spec in self.specs.items() if label not in found}
        if missing.keys() - self.failed.keys():
            found |= self._ask(rows, missing)
        failed = {label: {"error": error} for label, error in self.failed.items()}
        return [
            question_fields(row) | {"answers": {k: failed.get(k) or found[k][index] for k in self.specs}}
            for index, row in enumerate(rows)
        ]

    def _ask(self, rows: Sequence[Row], missing: Mapping[str, ReducerSpec]) -> dict[str, list[dict[str, Any]]]:
        """Ask some reducers all questions of a batch, and store what they answer."""
        inputs = self.backbone.prepare([row.open() for row in rows], [row.prompt for row in rows])
        totals = visual_counts(self.backbone, inputs)
        encoded = _encoded(self.backbone, inputs, missing, self.failed)
        found: dict[str, list[dict[str, Any]]] = {}
        for label, spec in missing.items():
            if label in self.failed:
                continue
            with self.failed.of(label):
                texts, prompt_map = generate(self.backbone, inputs, spec, self.max_new_tokens, encoded)
                kept = totals if prompt_map is None else prompt_map.per_layer
                found[label] = [{"answer": text, "kept": n} for text, n in zip(texts, kept, strict=True)]
                if self.store is not None:
                    self.store.add(label, spec, rows, found[label])
        return found


@torch.inference_mode()
def _encoded(
    backbone: Backbone, inputs: dict[str, Any], specs: Mapping[str, ReducerSpec], failed: Failures
) -> Encoded | None:
    """One pass of the tower for all reducers; one whose signals this backbone cannot give fails alone."""
    wanted: dict[str, frozenset[str]] = {}
    for label, spec in specs.items():
        if spec.reducer and spec.shares_encoding and label not in failed:
            with failed.of(label):
                wanted[label] = spec.signals
    if not wanted:
        return None
    try:
        return encode(backbone.model, inputs, frozenset().union(*wanted.values()), backbone.family)
    except Exception:
        if not failed.tolerant:
            raise
    for label, signals in wanted.items():
        with failed.of(label):
            encode(backbone.model, inputs, signals, backbone.family)
    sound = [signals for label, signals in wanted.items() if label not in failed]
    return encode(backbone.model, inputs, frozenset().union(*sound), backbone.family) if sound else None


def _filled(score: Score, records: Sequence[dict[str, Any]]) -> Score:
    """The score of one reducer at one budget, from the records of all questions."""
    mine = [record["answers"][score.label] for record in records]
    for found in mine:
        if "error" in found:
            return replace(score, error=found["error"])
    answers = [found["answer"] for found in mine]
    pairs = zip(answers, records, strict=True)
    correct = [float(is_correct(answer, record["expected"])) for answer, record in pairs]
    counts = [float(found["kept"]) for found in mine]
    return replace(score, kept=sum(counts) / len(counts), counts=counts, correct=correct, answers=answers)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator: Iterator[Any] = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
