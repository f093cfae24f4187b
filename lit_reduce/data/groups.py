"""Training data: pictures, each with the questions about it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lit_reduce.data.jsonl import Row

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Group:
    """One picture with its questions and answers.

    Attributes:
        key: Names the group in the cache; groups of equal content have equal keys.
        open: Returns the picture.
        turns: (prompt, answer) pairs; where the answer is None, the teacher's own takes its place.
    """

    key: str
    open: Callable[[], Image.Image]
    turns: tuple[Turn, ...]


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Groups the rows of a JSON-lines file by picture, in the order of the file."""
    by_picture: dict[str, list[Row]] = {}
    for row in rows:
        by_picture.setdefault(str(row.image) if isinstance(row.image, Path) else str(id(row.image)), []).append(row)
    groups = []
    for name, asked in by_picture.items():
        turns = tuple((row.prompt, row.answer[0] if isinstance(row.answer, list) else row.answer) for row in asked)
        groups.append(Group(_key(name, asked[0], turns), asked[0].open, turns))
    return groups


def _key(name: str, row: Row, turns: tuple[Turn, ...]) -> str:
    """A digest of what the teacher will see: the picture's bytes and the questions."""
    digest = hashlib.sha256(repr((name, turns)).encode())
    digest.update(row.image.read_bytes() if isinstance(row.image, Path) else row.image.tobytes())
    return digest.hexdigest()[:24]
