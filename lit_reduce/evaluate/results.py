"""What an evaluation found: one score for each reducer and budget."""

from dataclasses import dataclass, field
from typing import Any

from lit_reduce.benchmark.latency import Timing

ALL_TOKENS = "all tokens"


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

    @property
    def label(self) -> str:
        """Its name in files and messages: ``grid at 64``."""
        return self.reducer if self.keep is None else f"{self.reducer} at {self.keep}"


@dataclass
class Results:
    """What :func:`lit_reduce.evaluate.evaluator.evaluate` found.

    Attributes:
        backbone: Its id.
        rows: How many questions were asked.
        tokens: Visual tokens of an image before reduction.
        scores: All tokens first, then every reducer at every budget.
        families: The kind of each question, in the order of the rows; None where it is not known.
        records: One for each question: the question, and under ``answers`` what each reducer answered and kept.
    """

    backbone: str
    rows: int
    tokens: int
    scores: list[Score]
    families: list[str | None] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def score(self, reducer: str, keep: int | float | None) -> Score:
        """The score of a reducer at a budget. Raises KeyError when it was not measured."""
        for score in self.scores:
            if (score.reducer, score.keep) == (reducer, keep):
                return score
        raise KeyError((reducer, keep))
