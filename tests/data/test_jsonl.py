"""JSON lines: what a row may hold, and errors that name the line."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lit_reduce.data.jsonl import read_rows
from lit_reduce.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "pictures" / "a.png")
    return tmp_path


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_are_read_relative_to_the_file(folder: Path) -> None:
    good = {"image": "pictures/a.png", "prompt": "What\u2028is it?", "answer": 3, "id": "x"}
    path = write(
        folder,
        json.dumps(good, ensure_ascii=False),
        "",
        '{"image": "pictures/a.png", "prompt": "b", "answer": ["p", 2]}',
    )
    first, second = read_rows(path, need_answers=True)
    assert (first.prompt, first.answer, first.id, first.line, first.source) == (
        "What\u2028is it?",
        "3",
        "x",
        1,
        "pictures/a.png",
    )
    assert first.open().size == (6, 4)
    assert (second.answer, second.id, second.line) == (["p", "2"], None, 3)


def test_byte_order_mark_and_windows_lines(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"image": "pictures/a.png", "prompt": "b"}\r\n')
    assert read_rows(path)[0].prompt == "b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ('{"prompt": "a"}', "field image is missing"),
        ('{"image": "pictures/a.png"}', "field prompt is missing"),
        ('{"image": "pictures/a.png", "prompt": "  "}', "field prompt is empty"),
        ('{"image": 3, "prompt": "a"}', "field image is empty or not a text"),
        ('{"image": "pictures/b.png", "prompt": "a"}', "does not exist"),
        ('{"image": "rows.jsonl", "prompt": "a"}', "not an image"),
        ('{"image": "pictures/a.png", "prompt": "a", "answer": {}}', "field answer"),
        ('{"image": "pictures/a.png", "prompt": "a", "id": [1]}', "field id"),
        ('{"image": "pictures/a.png", "prompt": "a", "id": ' + "9" * 5000 + "}", "too many digits"),
        ('{"image": "pictures/a.png", "prompt": "a", "id": ' + "9" * 20 + "}", "field id"),
        ('{"image": "pictures/a.png", "prompt": "a", "answer": ' + "[" * 200_000, "nested too deeply"),
        (r'{"image": "pictures/a.png", "prompt": "a\ud800b"}', "surrogate"),
        (r'{"image": "pictures/a.png", "prompt": "a", "more": {"\udfff": 1}}', "surrogate"),
        (r'{"image": "pictures/a\u0000.png", "prompt": "a"}', "cannot be read"),
        ('{"image": "' + "a" * 5000 + '", "prompt": "a"}', "cannot be read|too long"),
        ('{"image": "pictures/a.png", "prompt": "a", "answer": NaN}', "not valid JSON"),
    ],
)
def test_a_bad_row_is_named(folder: Path, line: str, words: str) -> None:
    path = write(folder, '{"image": "pictures/a.png", "prompt": "fine"}', line)
    with pytest.raises(UserError, match=words) as caught:
        read_rows(path)
    assert f"{path} line 2: " in str(caught.value)


def test_missing_answers_files_and_rows(folder: Path) -> None:
    path = write(folder, '{"image": "pictures/a.png", "prompt": "a"}')
    with pytest.raises(UserError, match="line 1: field answer is missing"):
        read_rows(path, need_answers=True)
    with pytest.raises(UserError, match="has no rows"):
        read_rows(write(folder, "", " "))
    with pytest.raises(UserError, match="does not exist"):
        read_rows(folder / "none.jsonl")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(folder / "latin.jsonl")


def test_a_picture_damaged_past_its_header_is_named_when_opened(folder: Path) -> None:
    picture = folder / "pictures" / "a.png"
    Image.effect_noise((64, 64), 80).save(picture)
    picture.write_bytes(picture.read_bytes()[:-900])
    row = read_rows(write(folder, '{"image": "pictures/a.png", "prompt": "a"}'))[0]
    with pytest.raises(UserError, match=r"line 1: image .*a\.png is truncated"):
        row.open()


def test_pipes_devices_and_huge_files_are_no_rows(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    for path in (folder / "pipe", folder / "sparse", Path("/dev/zero"), folder):
        with pytest.raises(UserError, match=r"not a plain file|over the limit"):
            read_rows(path)
