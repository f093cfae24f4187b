"""Answer accuracy: what counts as the same answer."""

import pytest

from lit_reduce.evaluate.metrics import AnswerAccuracy, is_correct, normalise


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Red.", "red", True),
        ("the red  circle", "a red circle!", True),
        ("Yes, it is", "yes it is", True),
        ("1,000", "1000", True),
        ("t-shirt", "t shirt", True),
        ("50 %", "50", True),
        ("3.5", "35", False),
        ("3.5.", "3.5", True),
        ("-3", "3", False),
        (".5", "5", False),
        ("red", "dark red", False),
        ("A", "B", False),
        ("", "red", False),
        ("1, 2", "1 2", True),
    ],
)
def test_what_is_the_same(one: str, other: str, same: bool) -> None:
    assert is_correct(one, other) is same
    assert is_correct(other, one) is same


def test_a_lone_article_is_an_answer() -> None:
    assert normalise("A.") == "a"


def test_accuracy_over_batches_equals_one_batch() -> None:
    predictions, accepted = ["a1", "b", "c", "d"], ["a1", "x", ["y", "C"], "d"]
    whole, parts = AnswerAccuracy(), AnswerAccuracy()
    whole.update(predictions, accepted)
    parts.update(predictions[:1], accepted[:1])
    parts.update(predictions[1:], accepted[1:])
    assert whole.compute() == parts.compute() == 0.75
    whole.reset()
    whole.update(["no"], ["yes"])
    assert whole.compute() == 0


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        AnswerAccuracy().update(["a"], ["a", "b"])
