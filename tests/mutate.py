"""Seeded mutations of everything a user can hand in: ``python tests/mutate.py 2000 [SEED]``.

Each input is damaged and read. It must work or end in a `UserError` of one line, in seconds and in little memory.
"""

import dataclasses
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from lit_reduce import settings
from lit_reduce.data.images import open_image
from lit_reduce.data.jsonl import read_rows
from lit_reduce.errors import UserError
from lit_reduce.inference.resumable_jsonl import parse_record
from lit_reduce.plugin import BackboneId, PluginConfig, load_plugin, save_plugin
from lit_reduce.reducer import find
from lit_reduce.settings.train import TrainSettings

SECONDS = 20
MEMORY = 2 << 30
TOKENS = (
    b"${oc.env:HOME}", b"9" * 5000, b"[" * 3000, b"NaN", b"-1", b"1e999", b"null", b"\\ud800", b"\0", b"\xff\xfe",
    b"{}", b"2000000000", b"*a", b"&a", b"!!python/object:os.system", b'"', b"\n", b"true", b"../../etc", b"%!PS",
)  # fmt: skip

Case = tuple[Path, Callable[[], object]]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with one to three damages: a flipped bit, a cut, a repeated or removed part, or a strange token."""
    for _ in range(rng.randint(1, 3)):
        place, kind = rng.randrange(len(data) or 1), rng.randrange(5)
        if kind == 0 and data:
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + data[place : place + rng.randint(1, 64)] * 2 + data[place:]
        elif kind == 3:
            data = data[:place] + data[place + rng.randint(1, 64) :]
        else:
            data = data[:place] + rng.choice(TOKENS) + data[place + rng.randint(0, 8) :]
    return data


def make_cases(folder: Path) -> list[Case]:
    """One sound input of each kind in ``folder``, with what reads it."""
    cases: list[Case] = []
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp", "ppm", "avif", "jp2"):
        path = folder / f"a.{suffix}"
        Image.effect_noise((24, 24), 80).convert("RGB").save(path)
        cases.append((path, lambda path=path: open_image(path).load()))
    rows = folder / "rows.jsonl"
    rows.write_text('{"image": "sound.png", "prompt": "what?", "answer": ["a", 2], "id": 7}\n' * 3)
    Image.new("RGB", (8, 8)).save(folder / "sound.png")
    cases.append((rows, lambda: [row.open() for row in read_rows(rows)]))
    chosen = folder / "chosen.yaml"
    chosen.write_text(settings.to_yaml(TrainSettings()))
    cases.append((chosen, lambda: resolved(folder, f"config={chosen}")))
    words = folder / "words"
    words.write_text("reducer=covipal\nreducer.options.width=8\nseed=3\nlearning_rate=1e-3")
    cases.append((words, lambda: resolved(folder, *words.read_text("latin-1").split("\n"))))
    journal = folder / "journal.jsonl"
    journal.write_text('{"image": "sound.png", "prompt": "what?", "answer": "two"}\n')
    cases.append((journal, lambda: [parse_record(line) for line in journal.read_bytes().splitlines(keepends=True)]))
    cls = find("covipal")
    identity = BackboneId("pocket", "0" * 64, "llava", 8, 16, 24)
    with torch.random.fork_rng(devices=[]):
        plugin = save_plugin(folder / "plugin", cls(cls.smallest), PluginConfig("covipal", {}, identity, [4]))
    cases += [(path, lambda: load_plugin(plugin)) for path in sorted(plugin.iterdir()) if path.suffix != ".md"]
    return cases


def resolved(configs: Path, *words: str) -> object:
    """Training settings from words, read, checked, written and read again."""
    first = settings.resolve(TrainSettings, words, configs, "train")
    settings.save(first, configs / "again.yaml")
    again = settings.resolve(TrainSettings, [f"config={configs / 'again.yaml'}", "preset=none"], configs, "train")
    assert dataclasses.replace(again, preset=first.preset) == first
    return again


def run(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Try so many mutations; returns how many worked, and those that ended neither so nor in one line."""
    rng, worked, bad = random.Random(seed), 0, []
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        cases = make_cases(Path(name))
        sound = {path: path.read_bytes() for path, _ in cases}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        for number in range(count):
            path, read = cases[number % len(cases)]
            path.write_bytes(mutated(sound[path], rng))
            signal.alarm(SECONDS)
            try:
                read()
                worked += 1
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, it is reported
                if not isinstance(error, UserError) or "\n" in str(error):
                    bad.append(f"seed {seed}, number {number}, {path.name}: {type(error).__name__}: {str(error)[:300]}")
            finally:
                signal.alarm(0)
                path.write_bytes(sound[path])
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before > MEMORY:
            bad.append(f"seed {seed}: more than {MEMORY:,} bytes of memory")
    return worked, bad


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


if __name__ == "__main__":
    total = int(sys.argv[1])
    whole, wrong = run(total, *map(int, sys.argv[2:]))
    print(
        *wrong, f"{total} mutations: {whole} worked, {total - whole - len(wrong)} refused, {len(wrong)} bad", sep="\n"
    )
    sys.exit(bool(wrong))
