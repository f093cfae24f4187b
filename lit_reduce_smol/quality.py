"""How good smol is on pictures it has never seen: ``python -m lit_reduce_smol.quality data=FOLDER``.

Captions by greedy decoding, scored with CIDEr-D against five references; questions as in `lit_reduce_pocket.quality`:
an answer is right when every token of it is the most likely one. Everything also without the picture.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_reduce.backbones import Backbone, wrap
from lit_reduce.console import run
from lit_reduce.data.groups import Group
from lit_reduce.errors import UserError
from lit_reduce.evaluate.bootstrap import interval
from lit_reduce.files import check_writable, write_atomic
from lit_reduce.settings import configs_dir, resolve
from lit_reduce_pocket.quality import Asked, blind, score
from lit_reduce_smol.assemble import load
from lit_reduce_smol.cider import cider_d
from lit_reduce_smol.flickr import DESCRIBE, Flickr, tidy
from lit_reduce_smol.sources import EasyVqa, Nlvr, Source

LONGEST = 32  # tokens of a caption


@dataclass
class QualitySettings:
    """Settings of the measurement; configs/smol_quality.yaml explains each."""

    data: str = "outputs/smol/data"
    trained: str | None = None
    split: str = "test"
    photos: int = 1000
    match: int = 1000
    nlvr: int = 1000
    easy: int = 1000
    batch: int = 8
    threads: int = 0
    out: str = "outputs/smol/quality.json"


@torch.inference_mode()
def captions(backbone: Backbone, pictures: Sequence[Callable[[], Image.Image] | None], batch: int) -> list[str]:
    """What the model says about each picture; None stands for no picture."""
    said: list[str] = []
    for start in tqdm(range(0, len(pictures), batch), desc="captions", mininterval=10):
        some = [None if show is None else show() for show in pictures[start : start + batch]]
        inputs = backbone.prepare(some, [DESCRIBE] * len(some))
        said += backbone.decode(backbone.model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST), inputs)
    return said


def asked_of(source: Source, split: str, count: int) -> Iterator[Asked]:
    """The first pictures of a split that have questions, with all of these."""
    having = (i for i in source.indices(split) if source.pairs(i))
    for i, _ in zip(having, range(count), strict=False):
        pairs = tuple(source.pairs(i))
        yield Group(f"{source.name}-{i}", partial(source.open, i), pairs), [source.name] * len(pairs)


def caption_rows(backbone: Backbone, flickr: Flickr, split: str, count: int, batch: int) -> tuple[dict[str, Any], Any]:
    """CIDEr-D with and without the picture, and what was said about every photograph."""
    photos = flickr.indices(split)[:count]
    references = [[tidy(c) for c in flickr.photos[i].captions] for i in photos]
    said = captions(backbone, [partial(flickr.open, i) for i in photos], batch)
    unseen = captions(backbone, [None], 1) * len(photos)
    rows = {
        "captions, CIDEr-D": _entry(100 * cider_d(said, references)),
        "captions without the picture, CIDEr-D": _entry(100 * cider_d(unseen, references)),
    }
    return rows, [{"picture": flickr.photos[i].name, "said": text} for i, text in zip(photos, said, strict=True)]


def question_rows(backbone: Backbone, name: str, source: Source, split: str, count: int, batch: int) -> dict[str, Any]:
    """The share of right answers in % with and without the picture."""
    asked = list(asked_of(source, split, count))
    found = score(backbone, tqdm(asked, desc=name, mininterval=10))[source.name]
    hidden = blind(backbone, asked, batch)
    named = ((f"{name}, %", found), (f"{name} without the picture, %", hidden))
    return {row: _entry(100 * torch.tensor(values, dtype=torch.float64)) for row, values in named}


def measure(backbone: Backbone, chosen: QualitySettings) -> dict[str, Any]:
    """All rows that were asked for, each with a 95 % interval."""
    data, split = Path(chosen.data), chosen.split
    flickr = Flickr(data / "flickr8k")
    rows: dict[str, Any] = {}
    lines: list[dict[str, str]] = []
    if chosen.photos:
        rows, lines = caption_rows(backbone, flickr, split, chosen.photos, chosen.batch)
    sets: list[tuple[str, int, Callable[[], Source]]] = [
        ("match", chosen.match, lambda: flickr),
        ("nlvr1", chosen.nlvr, lambda: Nlvr(data / "nlvr")),
        ("easy-vqa", chosen.easy, EasyVqa),
    ]
    for name, count, source in sets:
        if count:
            rows |= question_rows(backbone, name, source(), split, count, chosen.batch)
    return {"backbone": backbone.identity.id, "split": split, "rows": rows, "captions": lines}


def _entry(values: Tensor) -> dict[str, float]:
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high, "count": len(values)}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| what | number | mean [95 % interval] |", "|---|---|---|"]
    for name, e in report["rows"].items():
        lines.append(f"| {name} | {e['count']} | {e['mean']:.1f} [{e['low']:.1f}, {e['high']:.1f}] |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Resolve the settings, measure, print and write."""
    chosen = resolve(QualitySettings, argv, configs_dir(), "smol_quality")
    if chosen.split not in ("test", "val") or min(chosen.photos, chosen.match, chosen.nlvr, chosen.easy) < 0:
        raise UserError("give split=test or split=val, and numbers of pictures that are not negative")
    check_writable(chosen.out)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    backbone = wrap(*load(None if chosen.trained is None else Path(chosen.trained)))
    report = measure(backbone, chosen)
    write_atomic(Path(chosen.out), json.dumps(report, indent=2) + "\n")
    print(table(report), end="")


if __name__ == "__main__":
    sys.exit(run(main))
