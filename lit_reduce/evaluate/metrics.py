"""Answer accuracy: exact match after normalising case, punctuation and articles."""

import re
import string
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation if mark not in "-.,"})
_MARKS = re.compile(r"\.(?!\d)|,(?!\d)|(?<!\d),|-(?!\d)|(?<=\w)-")  # not decimal points, not minus signs
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; decimal points and minus signs of numbers stay.

    Our reading of the VQA evaluation rules (Antol et al. 2015) without their table of contractions.
    "The Red, circle." becomes "red circle"; "3.5" and "35" stay different.
    """
    text = text.lower().replace("'", "").translate(_PUNCTUATION)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000 is 1000
    text = _MARKS.sub(" ", text)
    return " ".join(_ARTICLES.sub(" ", text).split()) or " ".join(text.split())


def is_correct(prediction: str, accepted: str | Sequence[str]) -> bool:
    """Whether the prediction equals one of the accepted answers after :func:`normalise`."""
    accepted = [accepted] if isinstance(accepted, str) else accepted
    return normalise(prediction) in {normalise(answer) for answer in accepted}


class AnswerAccuracy(Metric):
    """The share of answers that match exactly after :func:`normalise`."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], accepted: Sequence[str | Sequence[str]]) -> None:
        """Count one batch: a prediction, and its accepted answer or answers, per item."""
        pairs = zip(predictions, accepted, strict=True)
        self.correct += sum(is_correct(prediction, answers) for prediction, answers in pairs)
        self.total += len(predictions)

    def compute(self) -> Tensor:
        """Scalar share in [0, 1]; NaN before the first update."""
        return self.correct / self.total
