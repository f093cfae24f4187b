"""Accuracy of several reducers at several budgets on the same questions, each picture encoded once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from lit_reduce.backbones import Backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.latency import Timing, first_token
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.evaluate.plan import Plan, generate, visual_counts
from lit_reduce.reducer import Reducer
from lit_reduce.runtime import encode

ALL_TOKENS = "all tokens"


@dataclass
class Score:
    """One reducer at one budget.

    Attributes:
        reducer: Its name; ``all tokens`` for the plain backbone.
        keep: The budget as asked for; None for all tokens.
        kept: Mean kept tokens of an image, as measured.
        correct: 1.0 or 0.0 for each row, in the order of the rows.
        answers: The model's answers.
        timing: Time to the first token, when it was measured.
    """

    reducer: str
    keep: int | float | None
    kept: float = 0.0
    correct: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    timing: Timing | None = None

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
        scores: All tokens first, then every reducer at every budget.
    """

    backbone: str
    rows: int
    tokens: int
    scores: list[Score]

    def score(self, reducer: str, keep: int | float | None) -> Score:
        """The score of a reducer at a budget. Raises KeyError when it was not measured."""
        for score in self.scores:
            if (score.reducer, score.keep) == (reducer, keep):
                return score
        raise KeyError((reducer, keep))


def evaluate(
    backbone: Backbone,
    reducers: Mapping[str, Reducer],
    keeps: Sequence[int | float],
    rows: Iterable[Row],
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
    *,
    positions: Mapping[str, str] | None = None,
    max_new_tokens: int = 16,
    timing_runs: int = 0,
) -> Results:
    """Ask every question with all tokens and with every reducer at every budget.

    Args:
        backbone: The model.
        reducers: What to compare, by the name for the report.
        keeps: Budgets: tokens per image, or ratios.
        rows: Questions with answers; taken lazily, so they may be rendered on the way.
        batch_size: Questions at a time.
        on_batch: Called after each batch with its number of questions, for a progress bar.
        positions: For each reducer that was trained so, ``renumber``; ``keep`` otherwise.
        max_new_tokens: The longest answer.
        timing_runs: When above 0, time the first token of the first question this often for every plan.

    Raises:
        UserError: No rows, a row without an answer, a budget above the token count, a damaged picture.
    """
    scores = {ALL_TOKENS: Score(ALL_TOKENS, None)}
    plans = {ALL_TOKENS: Plan()}
    for name, reducer in reducers.items():
        for keep in keeps:
            key = f"{name} at {keep}"
            plans[key] = Plan(reducer.eval(), keep, (positions or {}).get(name, "keep"))
            plans[key].check(backbone)
            scores[key] = Score(name, keep)
    signals = frozenset[str]().union(*(reducer.signals for reducer in reducers.values()))
    before: list[int] = []
    timings: dict[str, Timing] = {}
    for batch in _batches(rows, batch_size):
        inputs = backbone.prepare([row.open() for row in batch], [row.prompt for row in batch])
        if timing_runs and not timings:
            single = backbone.prepare([batch[0].open()], [batch[0].prompt])
            timings = first_token(backbone, single, plans, timing_runs)
        before += visual_counts(backbone, inputs)
        with torch.inference_mode():
            encoded = encode(backbone.model, inputs, signals, backbone.family) if reducers else None
        for key, plan in plans.items():
            answers, logical = generate(backbone, inputs, plan, max_new_tokens, encoded)
            score = scores[key]
            score.answers += answers
            score.correct += [float(_matches(text, row)) for text, row in zip(answers, batch, strict=True)]
            score.kept += float(sum(visual_counts(backbone, inputs) if logical is None else logical.kept))
        if on_batch is not None:
            on_batch(len(batch))
    if not before:
        raise UserError("there is nothing to evaluate: no rows were given")
    done = [replace(score, kept=score.kept / len(before), timing=timings.get(key)) for key, score in scores.items()]
    return Results(backbone.identity.id, len(before), round(sum(before) / len(before)), done)


def _matches(prediction: str, row: Row) -> bool:
    if row.answer is None:
        raise UserError(f"line {row.line}: a question without an answer cannot be scored")
    return is_correct(prediction, row.answer)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator: Iterator[Any] = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
