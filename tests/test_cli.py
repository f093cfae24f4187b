"""The commands as a user runs them: other processes, real files, exit codes, and what is left on the disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from noise import noise
from PIL import Image

from lit_reduce import cli, console
from lit_reduce.backbones import load_backbone
from lit_reduce.errors import UserError
from lit_reduce.plugin import PluginConfig, save_plugin
from lit_reduce.reducer import available, create

ROOT = Path(__file__).parents[1]
QUESTIONS = 7


@pytest.fixture(scope="module")
def home(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures, good and bad, a plug-in, bad ones too, and questions."""
    home = tmp_path_factory.mktemp("home")
    noise(1, 64, 48).save(home / "a.png")
    (home / "truncated.png").write_bytes((home / "a.png").read_bytes()[:-3000])
    (home / "text.png").write_text("not a picture")
    Image.new("1", (9000, 9000)).save(home / "bomb.png")
    identity = load_backbone(tiny_folder).identity
    for name, backbone_hash in [("plug", identity.hash), ("foreign", "0" * 64), ("corrupt", identity.hash)]:
        identity.hash = backbone_hash
        config = PluginConfig(
            format_version=1, reducer="random", options={}, backbone=identity, budgets=[9], positions="keep",
            library_version="0.1.0", metrics={},
        )  # fmt: skip
        save_plugin(home / name, create("random", seed=3), config)
    weights = home / "corrupt" / "reducer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    rows = [
        {"image": "a.png", "prompt": f"what is red w{20 + i} ?", "id": i, "answer": "red"} for i in range(QUESTIONS)
    ]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "broken.jsonl").write_text(json.dumps(rows[0]) + '\n{"image": "none.png", "prompt": "what ?"}\n')
    (home / "unanswered.jsonl").write_text('{"image": "a.png", "prompt": "no answer here"}\n')
    damaged = [rows[0], rows[1] | {"image": "truncated.png"}, rows[2]]
    (home / "damaged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damaged))
    return home


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that forks one child for each command; see forkserver.py."""
    command = [sys.executable, str(ROOT / "tests" / "forkserver.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def run(server: subprocess.Popen[str], home: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``lit-reduce VERB`` in the user's folder on the tiny backbone; ``limit`` is the largest file in bytes."""
    streams = tmp_path_factory.mktemp("streams")

    def command(verb: str, *words: str, limit: int = 0, stdout: Path = streams / "out") -> Done:
        job = {"words": [verb, f"backbone={tiny_folder}", *words], "limit": limit, "cwd": str(home)}
        job |= {"stdout": str(stdout), "stderr": str(streams / "err")}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Done(code, stdout.read_text() if stdout.is_file() else "", (streams / "err").read_text())

    return command


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ASK = ("image=a.png", "prompt=what is red ?", "reducer=plug", "keep=9")
BAD = {
    "a missing picture": (("image=none.png",), "image none.png does not exist"),
    "a truncated picture": (("image=truncated.png",), "truncated or damaged"),
    "no picture at all": (("image=text.png",), "not an image"),
    "a picture bomb": (("image=bomb.png",), "over the limit of 64,000,000 pixels"),
    "an empty prompt": (("prompt=",), "prompt is empty"),
    "a blank prompt": (("prompt=  ",), "prompt is empty"),
    "keep of nothing": (("keep=0",), "keep=0"),
    "keep above the count": (("keep=37",), "only 36 visual tokens"),
    "keep of a word": (("keep=many",), "keep=many"),
    "a corrupt plug-in": (("reducer=corrupt",), "reducer.safetensors"),
    "a foreign plug-in": (("reducer=foreign",), "other weights"),
    "a missing plug-in": (("reducer=no/such/folder",), "no plug-in at no/such/folder"),
    "a misspelt reducer": (("reducer=fastervml",), "did you mean 'fastervlm'"),
    "a misspelt setting": (("kep=3",), "did you mean keep?"),
    "an overlay that is no picture": (("overlay=out.txt",), "overlay.png"),
    "an overlay below a file": (("overlay=a.png/out.png",), "cannot write a.png/out.png"),
    "an overlay on a device": (("overlay=/dev/full",), "/dev/full"),
    "input without output": (("input=questions.jsonl",), "belong together"),
    "a backbone that is not there": (("backbone=no/such/folder",), "no/such/folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, home: Path, case: str) -> None:
    words, message = BAD[case]
    before = files(home)
    done = run("predict", *ASK, *words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert files(home) == before


def test_reducers_between_layers_say_what_a_layer_reads(run: Run, home: Path) -> None:
    done = run("predict", *ASK, "reducer=fastv", "reducer.options.layer=1", "keep=4", "json=true", "runs=1")
    record = json.loads(done.stdout)
    assert record["kept_tokens"] == 4
    layers = 5  # of the tiny backbone: the first reads all 36 tokens, the others 4
    assert record["tokens_per_layer"] == (36 + 4 * (layers - 1)) / layers


def test_one_json_object_and_nothing_else(home: Path, tiny_folder: Path) -> None:
    """Through predict.py in an interpreter of its own: what imports print would be seen here."""
    words = [f"backbone={tiny_folder}", *ASK, "json=true", "runs=2", "max_new_tokens=3"]
    command = [sys.executable, str(ROOT / "predict.py"), *words]
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert list(record) == ["answer", "visual_tokens", "kept_tokens", "reducer_ms", "ttft_ms", "ttft_plain_ms"]
    assert (record["visual_tokens"], record["kept_tokens"]) == (36, 9)
    assert 0 < record["reducer_ms"] < record["ttft_ms"]
    assert 1 <= len(record["answer"].split()) <= 3  # special tokens are not shown
    assert done.stdout.count("\n") == 1


def test_the_words_for_people_and_the_overlay(run: Run, home: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "new" / "overlay.png"
    done = run("predict", *ASK, "runs=1", f"overlay={overlay}")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("answer", "tokens kept  9 of 36", "ms with the reducer", "ms with all tokens"):
        assert words in done.stdout
    with Image.open(overlay) as image:
        assert image.size == (672, 672)
    assert sorted(path.name for path in overlay.parent.iterdir()) == ["overlay.png", "overlay.settings.yaml"]
    assert "keep: 9" in (tmp_path / "new" / "overlay.settings.yaml").read_text()


def test_a_full_disk_keeps_the_old_overlay(run: Run, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.png"
    overlay.write_bytes(b"old but whole")
    done = run("predict", *ASK, "runs=1", f"overlay={overlay}", limit=2000)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {overlay}")
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == {"overlay.png": b"old but whole"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_stdout(run: Run) -> None:
    done = run("predict", *ASK, "runs=1", "json=true", stdout=Path("/dev/full"))
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device: the output\n"


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_questions_killed_and_resumed(run: Run, home: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("input=questions.jsonl", "reducer=plug", "keep=9", "max_new_tokens=2")
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    done = run("predict", *words, f"output={whole}", "batch_size=4")
    assert done.returncode == 0, done.stderr
    assert f"{QUESTIONS}/{QUESTIONS}" in done.stderr  # the progress bar
    records = answers(whole)
    assert [record["id"] for record in records] == list(range(QUESTIONS))
    assert list(records[0]) == ["id", "image", "prompt", "expected", "answer", "visual_tokens", "kept_tokens"]
    command = [sys.executable, str(ROOT / "predict.py"), f"backbone={tiny_folder}", *words, f"output={output}"]
    with subprocess.Popen(
        [*command, "batch_size=1"], cwd=home, env=environment(), stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while (not output.exists() or not output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    output.write_bytes(output.read_bytes()[:-5])  # and its last line is torn
    left = output.read_bytes().count(b"\n")
    done = run("predict", *words, f"output={output}", "batch_size=1")
    assert done.returncode == 0, done.stderr
    assert f"{left} of them from earlier runs" in done.stdout
    assert output.read_bytes() == whole.read_bytes()
    # Other settings must not be mixed into the same file.
    before = output.read_bytes()
    done = run("predict", *words, f"output={output}", "keep=4")
    assert done.returncode == 2
    assert "begun with another keep" in done.stderr
    assert output.read_bytes() == before


def test_a_bad_row_stops_before_the_start(run: Run, tmp_path: Path) -> None:
    done = run("predict", "input=broken.jsonl", f"output={tmp_path / 'out.jsonl'}", "reducer=plug", "keep=9")
    assert done.returncode == 2
    assert done.stderr == "error: broken.jsonl line 2: image none.png does not exist\n"
    assert files(tmp_path) == {}


def test_a_damaged_picture_stops_or_is_recorded(run: Run, tmp_path: Path) -> None:
    words = ("input=damaged.jsonl", "reducer=plug", "keep=9", "max_new_tokens=2", "batch_size=1")
    done = run("predict", *words, f"output={tmp_path / 'a.jsonl'}")
    assert done.returncode == 2
    assert "error: line 2: image truncated.png is truncated or damaged" in done.stderr
    assert [record["id"] for record in answers(tmp_path / "a.jsonl")] == [0]
    done = run("predict", *words, f"output={tmp_path / 'a.jsonl'}", "on_error=record")
    assert done.returncode == 0
    records = answers(tmp_path / "a.jsonl")
    assert ["error" in record for record in records] == [False, True, False]
    assert [record["id"] for record in records] == [0, 1, 2]


def test_a_full_disk_under_a_file_of_answers(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ("input=questions.jsonl", "reducer=plug", "keep=9", "max_new_tokens=2", f"output={output}", "batch_size=1")
    done = run("predict", *words, limit=500)
    assert done.returncode == 2
    assert f"error: cannot write {output}" in done.stderr
    assert 0 < len(answers(output)) < QUESTIONS
    assert run("predict", *words).returncode == 0
    assert [record["id"] for record in answers(output)] == list(range(QUESTIONS))


def test_evaluate_writes_a_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    words = ("reducer=plug", "keep=[9,0.1]", "data=questions.jsonl", f"out={out}")
    done = run("evaluate", *words, "runs=1", "max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    measured = [(entry["reducer"], entry["kept_tokens"]) for entry in report["scores"]]
    assert measured == [("all tokens", 36), ("random", 9), ("random", 4)]
    assert (report["rows"], report["visual_tokens"]) == (QUESTIONS, 36)
    assert all(entry["first_token_ms"]["median"] > 0 for entry in report["scores"])
    assert sorted(files(tmp_path)) == [
        "report.json", "report.md", "report.png", "report.rows.jsonl", "report.settings.yaml",
    ]  # fmt: skip
    assert "random" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data=unanswered.jsonl",), "unanswered.jsonl line 1"),
        (("data=questions.jsonl", "keep=[9,37]"), "only 36"),
        (("data=questions.jsonl", "out=report.txt"), ".json"),
        ((), "no data are given"),
    ],
)
def test_evaluate_refuses(run: Run, home: Path, words: tuple[str, ...], message: str) -> None:
    before = files(home)
    done = run("evaluate", "reducer=grid", "keep=9", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert files(home) == before


def test_list_help_and_unknown_verbs(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    listed = capfd.readouterr().out
    for name in ("random", "grid", "pool", "fastervlm", "divprune"):
        assert f"\n{name} " in "\n" + listed
    assert cli.main(["--help"]) == 0
    assert "predict" in capfd.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["predikt"]) == 2
    assert "error: unknown verb predikt" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--help"])
    assert stop.value.code == 0
    assert "# visual tokens that stay of each picture" in capfd.readouterr().out


def test_exit_codes(capfd: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> console.Command:
        def command(_: object) -> None:
            raise error

        return command

    assert console.run(raises(UserError("what\nwhere")), []) == 2
    assert capfd.readouterr().err == "error: what where\n"
    assert console.run(raises(KeyboardInterrupt()), []) == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert console.run(raises(PermissionError(13, "Permission denied", "x.png")), []) == 2
    assert capfd.readouterr().err == "error: Permission denied: x.png\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        console.run(raises(ZeroDivisionError()), [])


def test_list_is_a_table_and_finds_plug_ins(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "plug", tmp_path / "checkpoints" / "mine")
    (tmp_path / "checkpoints" / "broken").mkdir()
    (tmp_path / "checkpoints" / "broken" / "reducer_config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list"]) == 0
    table, plugins = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == ["reducer", "kind", "site", "use", "signals", "paper"]
    for name, cls in available().items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert line.index(cls.kind) == lines[0].index("kind")  # columns line up
        assert line.index(cls.site, lines[0].index("site")) == lines[0].index("site")
    assert plugins.splitlines()[2].split()[:2] == ["checkpoints/broken", "damaged"]
    assert plugins.splitlines()[3].split()[:2] == ["checkpoints/mine", "random"]


def test_compare_as_a_user_runs_it(run: Run, home: Path, tmp_path: Path) -> None:
    words = ("data=questions.jsonl", "keep=9", "reducers=[grid,plug,foreign]", f"out={tmp_path / 'page.html'}")
    done = run("compare", *words, "runs=0", "max_new_tokens=2", "pictures=1")
    assert done.returncode == 0, done.stderr
    assert "foreign failed at 9: this random plug-in was trained on" in done.stdout
    assert f"{QUESTIONS}/{QUESTIONS}" in done.stderr  # the progress bar
    assert "<html" in (tmp_path / "page.html").read_text()
    done = run("compare", "data=nothing", *words[1:])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "known set (pocket, pocket-val, " in done.stderr
