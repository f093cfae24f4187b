"""Answers on the disk, by who was asked: a killed run goes on where it stopped, and no question is asked twice."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_reduce.backbones import Backbone
from lit_reduce.data.images import MAX_BYTES
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.files import read_plain
from lit_reduce.inference.resumable_jsonl import append_records, parse_record
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.version import __version__

Answers = dict[str, dict[str, Any]]
MAX_JOURNAL = 1 << 28  # bytes of a file of answers


class AnswerStore:
    """A folder with one JSON-lines file for each reducer and budget, and one line in it for each question.

    The name of a file holds a digest of everything that decides an answer beside the question: the version of the
    library, the backbone's weights and number format, the reducer's weights or options, positions, budget and the
    longest answer. A line holds a digest of the picture and the prompt. So several runs may share a folder, one after
    the other or at the same time. Changes of code between versions are not noticed: remove the folder after them.
    """

    def __init__(self, folder: str | Path, backbone: Backbone, max_new_tokens: int) -> None:
        """Prepare to read and write answers of ``backbone`` with at most ``max_new_tokens`` tokens in ``folder``."""
        self.folder = Path(folder)
        self.base = (__version__, backbone.identity.hash, str(backbone.model.dtype), max_new_tokens)
        self.known: dict[Path, Answers] = {}

    def path(self, label: str, spec: ReducerSpec) -> Path:
        """The file with the answers under ``spec``; ``label`` is the readable part of its name."""
        readable = "".join(mark if mark.isalnum() or mark in "-." else "_" for mark in label)[-80:]
        return self.folder / f"{readable}-{_digest(repr((*self.base, spec.fingerprint)))}.jsonl"

    def find(self, label: str, spec: ReducerSpec, rows: Sequence[Row]) -> list[dict[str, Any]] | None:
        """The stored answers to some questions; None where one of them is missing."""
        known = self._read(self.path(label, spec))
        if not known:
            return None
        found = [known.get(question_digest(row)) for row in rows]
        return [answer for answer in found if answer is not None] if None not in found else None

    def add(self, label: str, spec: ReducerSpec, rows: Sequence[Row], answers: Sequence[dict[str, Any]]) -> None:
        """Store the answers to some questions.

        Raises:
            UserError: The folder cannot be written, or the disk is full.
        """
        path = self.path(label, spec)
        known = self._read(path)
        fresh = {question_digest(row): answer for row, answer in zip(rows, answers, strict=True)}
        fresh = {question: answer for question, answer in fresh.items() if question not in known}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab+", buffering=0) as file:
                append_records(file, [{"question": question, **answer} for question, answer in fresh.items()])
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; what was finished is kept") from error
        known |= fresh

    def remove(self) -> None:
        """Remove the files of this run, and the folder when nothing else is in it."""
        for path in self.known:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _read(self, path: Path) -> Answers:
        """The answers of a file by question; a torn line counts for nothing, so its question is asked again."""
        if path not in self.known:
            lines = read_plain(path, MAX_JOURNAL).splitlines(keepends=True) if path.exists() else []
            records = [record for record in map(parse_record, lines) if record is not None and _is_answer(record)]
            self.known[path] = {record.pop("question"): record for record in records}
        return self.known[path]


def question_digest(row: Row) -> str:
    """What is asked: a digest of the picture's content and the prompt."""
    image = read_plain(row.image, MAX_BYTES) if isinstance(row.image, Path) else row.image.tobytes()
    return _digest(repr((hashlib.sha256(image).digest(), row.prompt)))


def _is_answer(record: dict[str, Any]) -> bool:
    return isinstance(record.get("question"), str) and isinstance(record.get("answer"), str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
