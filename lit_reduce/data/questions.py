"""The questions to score on: a question set of an installed reference, or a JSON-lines file of the user."""

from collections.abc import Iterable
from pathlib import Path

from lit_reduce.data.jsonl import Row, read_rows
from lit_reduce.errors import UserError
from lit_reduce.registry import question_sets

DEFAULT_COUNT = 500  # of a set that could go on for ever, where no count is asked for


def scored_rows(name: str, count: int | None = None) -> tuple[Iterable[Row], int]:
    """Rows with answers, and how many there are; those of a question set are made while they are read.

    Args:
        name: A JSON-lines file, or the name of a question set; a file of that name comes first.
        count: The first so many; None for all of a file.

    Raises:
        UserError: Neither a file nor a known set, a file that is not usable, or a row without an answer.
    """
    named = question_sets()
    if name in named and not Path(name).exists():
        wanted = DEFAULT_COUNT if count is None else count
        return named[name](wanted), wanted
    if not Path(name).suffix and not Path(name).exists():
        raise UserError(f"data={name} is neither a file nor a known set ({', '.join(named) or 'none'})")
    rows = read_rows(name, need_answers=True)[:count]
    return rows, len(rows)
