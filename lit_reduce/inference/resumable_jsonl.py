"""Answer a whole JSON-lines file; a run that was killed goes on where it stopped, no line lost or repeated."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.files import is_at, locked

Answers = Callable[[Sequence[Row]], list[dict[str, Any]]]


@dataclass(frozen=True)
class OpenAnswers:
    """A file of answers that this process holds, and how many of the rows are answered in it."""

    path: Path
    file: FileIO
    done: int

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append one line for each record.

        Raises:
            UserError: The file cannot be written, or is no longer there under its name.
        """
        try:
            append_records(self.file, records)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; what was finished is kept") from error
        if not is_at(self.file, self.path):
            raise UserError(f"{self.path} was removed or replaced while it was being written: run again")


@contextmanager
def open_answers(output: str | Path, rows: Sequence[Row]) -> Iterator[OpenAnswers]:
    """Lock a file of answers and compare its lines with the rows; an unfinished last line is cut, nothing else changes.

    Raises:
        UserError: Another run is writing the file, it cannot be opened, or it is not a file of answers to these rows.
    """
    output = Path(output)
    with locked(output) as file:
        yield OpenAnswers(output, file, _recover(file, rows, output))


def answer_rows(
    rows: Sequence[Row], output: OpenAnswers, answers: Answers, batch_size: int, on_batch: Callable[[int], None]
) -> None:
    """Append one JSON line for every row that has none yet, in the order of the rows; a batch is written at once.

    Args:
        rows: All rows of the input.
        output: The file that grows.
        answers: What to write for some rows: ``answer`` and whatever else belongs into a line.
        batch_size: Rows at a time.
        on_batch: Called with the number of rows that are done, first with those of earlier runs.

    Raises:
        UserError: The file cannot be written, or was removed or replaced meanwhile.
    """
    on_batch(output.done)
    for start in range(output.done, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        output.append([question_fields(row) | answer for row, answer in zip(batch, answers(batch), strict=True)])
        on_batch(len(batch))


def question_fields(row: Row) -> dict[str, Any]:
    """The part of a line that repeats the question: it says later which row was answered."""
    record: dict[str, Any] = {} if row.id is None else {"id": row.id}
    record |= {"image": row.source, "prompt": row.prompt}
    record |= {} if row.answer is None else {"expected": row.answer}
    return record if row.family is None else record | {"family": row.family}


def append_records(file: FileIO, records: Sequence[dict[str, Any]]) -> None:
    """Append one JSON line for each record to a file opened with ``ab+``, whole lines or none.

    A torn last line, which a killed process left behind, is closed first: it stays a line of its own.
    """
    end = file.seek(0, os.SEEK_END)
    torn = False
    if end:
        file.seek(end - 1)
        torn = file.read(1) != b"\n"
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    data = b"\n" + data if torn else data
    try:
        written = 0
        while written < len(data):
            written += file.write(data[written:])
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)  # a full disk takes part of a line: leave only whole ones behind
        raise


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a finished line; None for a torn one, and for one that no run could have written."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair could be neither printed nor saved
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _recover(file: FileIO, rows: Sequence[Row], output: Path) -> int:
    """Cut an unfinished last line and return how many are finished, each compared with its row."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(lines, start=1):
        asked = question_fields(rows[number - 1]) if number <= len(rows) else None
        if number > len(whole):
            fits = asked is not None and _begins(asked, line, number > 1)
        else:
            record = parse_record(line)
            fits = record is not None and asked is not None and asked == {key: record.get(key) for key in asked}
        if not fits:
            raise UserError(f"{output} line {number} does not answer row {number} of the input: give another output")
    if len(whole) < len(lines):
        file.truncate(sum(map(len, whole)))
    return len(whole)


def _begins(asked: dict[str, Any], torn: bytes, zeros: bool) -> bool:
    """Whether a torn line begins like the one that answers a question; a power cut may leave zeros at its end."""
    head = json.dumps(asked, ensure_ascii=False).encode()[:-1]  # without the closing brace
    left = torn.rstrip(b"\0")
    return (bool(left) or zeros) and (left.startswith(head) or head.startswith(left))
