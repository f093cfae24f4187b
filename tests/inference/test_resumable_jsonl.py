"""Answering a file: nothing lost, nothing repeated, whatever happens in between."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.inference.resumable_jsonl import answer_rows, open_answers, parse_record

ROWS = [Row(f"prompt {i} \u2028 é", Image.new("RGB", (1, 1)), id=i, line=i + 1, source=f"{i}.png") for i in range(20)]


class Model:
    """Stands for a model: notes which rows it was asked, and can die at one of them."""

    def __init__(self, dies_at: int = 99) -> None:
        self.asked: list[Any] = []
        self.dies_at = dies_at

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        self.asked += [row.id for row in rows]
        if self.dies_at in self.asked:
            raise KeyboardInterrupt
        return [{"answer": f"answer\n{row.id}"} for row in rows]


def run(output: Path, model: Model | None = None, batch: int = 3) -> list[int]:
    steps: list[int] = []
    with open_answers(output, ROWS) as opened:
        answer_rows(ROWS, opened, model or Model(), batch, steps.append)
    return steps


def whole(output: Path) -> bytes:
    """The file of a run that was never disturbed."""
    run(output.with_name("whole.jsonl"))
    return output.with_name("whole.jsonl").read_bytes()


def test_one_line_a_row_in_order(tmp_path: Path) -> None:
    steps = run(tmp_path / "out.jsonl")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [record["id"] for record in records] == list(range(20))
    assert records[3] == {"id": 3, "image": "3.png", "prompt": ROWS[3].prompt, "answer": "answer\n3"}
    assert steps == [0, 3, 3, 3, 3, 3, 3, 2]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    output, second = tmp_path / "out.jsonl", Model()
    with pytest.raises(KeyboardInterrupt):
        run(output, Model(dies_at=7))
    assert run(output, second)[0] == 6
    assert second.asked == list(range(6, 20))
    assert output.read_bytes() == whole(output)
    third = Model()
    assert run(output, third) == [20]
    assert third.asked == []


def test_torn_anywhere_it_recovers(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    expected = whole(output)
    cuts = [0, 1, len(expected) - 1, *random.Random(0).sample(range(len(expected)), 60)]
    for cut in cuts:
        output.write_bytes(expected[:cut])
        model = Model()
        run(output, model)
        assert output.read_bytes() == expected
        assert model.asked[0] == expected[:cut].count(b"\n")


def test_a_last_line_of_zeros_recovers(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    expected = whole(output)
    output.write_bytes(expected[: expected.index(b"\n") + 1] + b"\0" * 50)  # as after a power cut
    run(output)
    assert output.read_bytes() == expected


def test_an_output_of_other_rows_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    expected = whole(output)
    lines = expected.split(b"\n")
    for content in [
        b"notes of mine\n" + expected,
        b"\n".join([lines[1], lines[0], *lines[2:]]),
        expected + lines[0] + b"\n",
        b"\n".join([lines[0], b"{", *lines[2:]]),
    ]:
        output.write_bytes(content)
        with pytest.raises(UserError, match=r"line \d+ does not answer row"):
            run(output)
        assert output.read_bytes() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, room = tmp_path / "out.jsonl", 500

    class FullDisk(FileIO):
        def write(self, data: Any) -> int:
            free = max(0, room - self.tell())
            if not free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(bytes(data)[:free])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode, buffering: FullDisk(self, mode.replace("b", "")))
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            run(output)
    left = output.read_bytes()
    assert left == whole(output)[: len(left)]
    assert 0 < len(left) <= room
    assert left.endswith(b"\n")
    run(output)
    assert output.read_bytes() == whole(output)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def intrude(rows: Sequence[Row]) -> list[dict[str, Any]]:
        with pytest.raises(UserError, match="another run"):
            run(output)
        return [{"answer": ""} for _ in rows]

    with open_answers(output, ROWS) as opened:
        answer_rows(ROWS, opened, intrude, 10, lambda _: None)
    assert output.read_bytes().count(b"\n") == 20


def test_killed_hard_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at random moments: the finished file is that of an undisturbed run."""
    output = tmp_path / "out.jsonl"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from lit_reduce.data.jsonl import Row\n"
        "from lit_reduce.inference.resumable_jsonl import answer_rows, open_answers\n"
        "rows = [Row(f'{i}', Image.new('RGB', (1, 1)), id=i, source='a') for i in range(40)]\n"
        "def answers(batch):\n    time.sleep(0.01)\n    return [{'answer': 'x' * 3000} for row in batch]\n"
        "with open_answers(sys.argv[1], rows) as opened:\n"
        "    answer_rows(rows, opened, answers, 1, lambda _: print('on', flush=True))\n"
    )
    command = [sys.executable, str(script), str(output)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    kills, order = 0, random.Random(1)
    for _ in range(30):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=here) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(order.uniform(0.02, 0.15))
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
        kills += process.returncode == -signal.SIGKILL
        if output.read_bytes().count(b"\n") == 40:
            break
    else:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=here)
    assert kills > 0
    assert [json.loads(line)["id"] for line in output.read_bytes().splitlines()] == list(range(40))


FOREIGN = [b'{"precious":1}', b"notes of mine", b'{"id": 0, "image": "0.png", "prompt": "other', b"{}\n", b"\0" * 9]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("finished", [0, 3])
def test_a_tail_that_is_not_this_rows_own_is_kept(tmp_path: Path, content: bytes, finished: int) -> None:
    output = tmp_path / "out.jsonl"
    lines = whole(output).splitlines(keepends=True)
    content = content + b"mine" if finished else content
    output.write_bytes(b"".join(lines[:finished]) + content)
    with pytest.raises(UserError, match=f"line {finished + 1} does not answer"):
        run(output)
    assert output.read_bytes() == b"".join(lines[:finished]) + content


def test_a_whole_file_with_more_behind_it_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    content = whole(output) + b'{"id'
    output.write_bytes(content)
    with pytest.raises(UserError, match="line 21 does not answer"):
        run(output)
    assert output.read_bytes() == content


@pytest.mark.parametrize("replaced", [False, True])
def test_an_output_that_disappears_is_an_error(tmp_path: Path, replaced: bool) -> None:
    output = tmp_path / "out.jsonl"

    def answers(rows: Sequence[Row]) -> list[dict[str, Any]]:
        if rows[0].id == 10:
            output.unlink()
            if replaced:
                output.write_text("of somebody else")
        return [{"answer": ""} for _ in rows]

    with open_answers(output, ROWS) as opened, pytest.raises(UserError, match="removed or replaced"):
        answer_rows(ROWS, opened, answers, 5, lambda _: None)
    assert output.exists() == replaced


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with open_answers(tmp_path / "out.jsonl", ROWS) as opened:
        assert opened.done == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", rb'{"a": "\ud800"}', b"[1]", b"null", b'"text"', b"\xff", b"{"],
)
def test_lines_that_no_run_wrote_are_no_records(line: bytes) -> None:
    assert parse_record(line + b"\n") is None
