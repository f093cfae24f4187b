"""Answer a whole JSON-lines file; a run that was killed goes on where it stopped, no line lost or repeated."""

import json
import os
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError

Answers = Callable[[Sequence[Row]], list[dict[str, Any]]]


def answer_rows(
    rows: Sequence[Row], output: str | Path, answers: Answers, batch_size: int, on_batch: Callable[[int], None]
) -> int:
    """Append one JSON line to ``output`` for every row, in the order of the rows.

    Lines that are already there are taken as done, after checking that they answer these rows; an unfinished last line
    (the process was killed, the disk was full) is removed and made again. A batch is written at once.

    Args:
        rows: All rows of the input.
        output: The file that grows.
        answers: What to write for some rows: ``answer`` and whatever else belongs into a line.
        batch_size: Rows at a time.
        on_batch: Called with the number of rows that are done, first with those of earlier runs.

    Returns:
        How many of the rows earlier runs had answered.

    Raises:
        UserError: The file cannot be written, another run is writing it, or it answers other rows.
    """
    output = Path(output)
    try:
        with output.open("ab+", buffering=0) as file:
            _lock(file, output)
            done = _recover(file, rows, output)
            on_batch(done)
            for start in range(done, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                fresh = [question_fields(row) | answer for row, answer in zip(batch, answers(batch), strict=True)]
                append_records(file, fresh)
                on_batch(len(batch))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; what was finished is kept") from error
    return done


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
    if lines and parse_record(lines[-1]) is None:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        asked = question_fields(rows[number - 1]) if number <= len(rows) else None
        if record is None or asked is None or asked != {key: record.get(key) for key in asked}:
            raise UserError(f"{output} line {number} does not answer row {number} of the input: give another output")
    file.truncate(sum(map(len, lines)))
    return len(lines)


def _lock(file: FileIO, output: Path) -> None:
    """Two runs that append to one file would repeat lines."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{output} is being written by another run: wait for it, or give another output") from error
    except OSError:  # some network file systems have no locks
        return
