import json

import pytest
from PIL import Image

from lit_reduce.data.questions import scored_rows
from lit_reduce.errors import UserError
from lit_reduce.registry import Reference


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A reference with one question set; returns the counts that it was asked for."""
    asked = []
    reference = Reference("moon", tmp_path, {"moon-val": lambda count: asked.append(count) or iter(range(count))})
    monkeypatch.setattr("lit_reduce.registry.references", lambda: {"moon": reference})
    monkeypatch.chdir(tmp_path)
    return asked


def write(path, rows):
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    path.write_text("".join(json.dumps({"image": "a.png", "prompt": "?"} | row) + "\n" for row in rows))


def test_a_question_set_is_made_while_it_is_read(world):
    rows, count = scored_rows("moon-val", 3)
    assert (list(rows), count) == ([0, 1, 2], 3)
    assert scored_rows("moon-val")[1] == 500
    assert world == [3, 500]


def test_a_file_comes_before_a_set_of_the_same_name(world, tmp_path):
    write(tmp_path / "moon-val", [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}])
    rows, count = scored_rows("moon-val", 2)
    assert ([row.answer for row in rows], count) == (["1", "2"], 2)
    assert world == []


def test_what_is_neither_is_refused_with_the_known_sets(world, tmp_path):
    with pytest.raises(UserError, match=r"data=mars is neither a file nor a known set \(moon-val\)"):
        scored_rows("mars")
    with pytest.raises(UserError, match=r"mars\.jsonl does not exist"):
        scored_rows("mars.jsonl")
    write(tmp_path / "open.jsonl", [{}])
    with pytest.raises(UserError, match="answer is missing"):
        scored_rows("open.jsonl")
