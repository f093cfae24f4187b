"""Questions about pictures as JSON lines: fields ``image`` and ``prompt``, optional ``id``, ``answer``, ``family``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lit_reduce.data.images import check_image, open_image
from lit_reduce.errors import UserError
from lit_reduce.files import read_plain

MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """One question about one picture.

    Attributes:
        prompt: The question.
        image: Where the picture is, or the picture itself when it was made in memory.
        answer: The accepted answer or answers, when they are known.
        id: The user's own name of the row.
        line: The line of the file it came from, counted from 1; 0 for rows made in memory.
        source: The row as the user wrote ``image``: repeated in outputs.
        family: What kind of question it is, for accuracies by kind.
    """

    prompt: str
    image: Path | Image.Image
    answer: str | list[str] | None = None
    id: str | int | None = None
    line: int = 0
    source: str = ""
    family: str | None = None

    def open(self) -> Image.Image:
        """The decoded RGB picture. Raises UserError naming the line when the file is damaged."""
        if isinstance(self.image, Image.Image):
            return self.image
        try:
            return open_image(self.image)
        except UserError as error:
            raise UserError(f"line {self.line}: {error}") from error


def read_rows(path: str | Path, need_answers: bool = False, check_images: bool = True) -> list[Row]:
    """Read and check a whole file before any work starts; blank lines are skipped.

    Args:
        path: A JSON-lines file; ``image`` is taken relative to its folder.
        need_answers: Refuse rows without ``answer``, and files without rows.
        check_images: Read the header of every picture too.

    Raises:
        UserError: Names the file and the first bad line and says what is wrong with it.
    """
    path = Path(path)
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = _row(_parse(line), path.parent, number)
            if need_answers and row.answer is None:
                raise UserError("field answer is missing")
            if check_images and isinstance(row.image, Path):
                check_image(row.image)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: give one JSON object per line with image and prompt")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        # Only \n ends a line: JSON texts may hold other characters that str.splitlines breaks at.
        return read_plain(path, MAX_BYTES).decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error


def _parse(line: str) -> Any:
    """The value of a line; texts that no file could hold again, as half of a surrogate pair, are refused."""
    try:
        value = json.loads(line, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg})") from error
    except UnicodeEncodeError as error:
        raise UserError(f"not valid JSON (half of a surrogate pair, \\u{ord(error.object[error.start]):x})") from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deeply)") from error
    except ValueError as error:  # Python's own limit of digits
        raise UserError("a number has too many digits") from error
    return value


def _refuse(constant: str) -> None:
    raise UserError(f"not valid JSON ({constant} is no number)")


def _row(record: Any, folder: Path, number: int) -> Row:
    if not isinstance(record, Mapping):
        raise UserError("expected a JSON object with image and prompt")
    for name in ("image", "prompt"):
        if name not in record:
            raise UserError(f"field {name} is missing (fields: {', '.join(map(str, record)) or 'none'})")
        if not isinstance(record[name], str) or not record[name].strip():
            raise UserError(f"field {name} is empty or not a text")
    own: Any = record.get("id")
    answer: Any = record.get("answer")
    if isinstance(answer, bool | int | float):
        answer = str(answer)
    if isinstance(answer, list):
        answer = [str(item) for item in answer] or None
    if not isinstance(answer, str | list | None):
        raise UserError("field answer is neither a text nor a list of texts")
    if isinstance(own, bool) or not isinstance(own, str | int | None) or (isinstance(own, int) and abs(own) >> 63):
        raise UserError("field id is neither a text nor a whole number of 64 bits")
    family = record.get("family")
    if not isinstance(family, str | None):
        raise UserError("field family is not a text")
    image = record["image"]
    return Row(record["prompt"], folder / image, answer, own, number, source=image, family=family)
