"""How good smol is on photographs it has never seen: ``python -m lit_reduce_smol.quality data=FOLDER``.

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
from lit_reduce_smol.flickr import DESCRIBE, MATCH, Flickr, tidy


@dataclass
class QualitySettings:
    """Settings of the measurement; configs/smol_quality.yaml explains each."""

    data: str = "outputs/smol/data"
    trained: str | None = None
    split: str = "test"
    photos: int = 1000
    matched: int = 1000
    batch: int = 8
    threads: int = 0
    out: str = "outputs/smol/quality.json"


def captions(backbone: Backbone, pictures: Sequence[Callable[[], Image.Image] | None], batch: int) -> list[str]:
    """What the model says about each picture; None stands for no picture."""
    said: list[str] = []
    for start in tqdm(range(0, len(pictures), batch), desc="captions", mininterval=10):
        some = [None if show is None else show() for show in pictures[start : start + batch]]
        inputs = backbone.prepare(some, [DESCRIBE] * len(some))
        said += backbone.decode(backbone.model.generate(**inputs, do_sample=False, max_new_tokens=32), inputs)
    return said


def match_questions(flickr: Flickr, split: str, count: int) -> Iterator[Asked]:
    """The first photographs of a split that have sentences, with all of these."""
    having = [i for i in flickr.indices(split) if flickr.photos[i].sentences][:count]
    for i in having:
        pairs = tuple((MATCH.format(tidy(s)), "yes" if right else "no") for s, right in flickr.photos[i].sentences)
        yield Group(flickr.photos[i].name, partial(flickr.open, i), pairs), ["match"] * len(pairs)


@torch.inference_mode()
def measure(backbone: Backbone, flickr: Flickr, chosen: QualitySettings) -> dict[str, Any]:
    """All rows, each with a 95 % interval, and what was said about every photograph."""
    photos = flickr.indices(chosen.split)[: chosen.photos]
    references = [[tidy(c) for c in flickr.photos[i].captions] for i in photos]
    said = captions(backbone, [partial(flickr.open, i) for i in photos], chosen.batch)
    unseen = captions(backbone, [None], 1) * len(photos)
    rows = {
        "captions, CIDEr-D": _entry(100 * cider_d(said, references)),
        "captions without the picture, CIDEr-D": _entry(100 * cider_d(unseen, references)),
    }
    asked = list(match_questions(flickr, chosen.split, chosen.matched))
    found = score(backbone, tqdm(asked, desc="match", mininterval=10))["match"]
    hidden = blind(backbone, asked, chosen.batch)
    for name, values in (("match", found), ("match without the picture", hidden)):
        rows[f"{name}, %"] = _entry(100 * torch.tensor(values, dtype=torch.float64))
    lines = [{"picture": flickr.photos[i].name, "said": text} for i, text in zip(photos, said, strict=True)]
    return {"backbone": backbone.identity.id, "split": chosen.split, "rows": rows, "captions": lines}


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
    if chosen.photos < 1 or chosen.matched < 1:
        raise UserError(f"photos={chosen.photos} matched={chosen.matched}: give positive numbers")
    check_writable(chosen.out)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    flickr = Flickr(Path(chosen.data) / "flickr8k")
    backbone = wrap(*load(None if chosen.trained is None else Path(chosen.trained)))
    report = measure(backbone, flickr, chosen)
    write_atomic(Path(chosen.out), json.dumps(report, indent=2) + "\n")
    print(table(report), end="")


if __name__ == "__main__":
    sys.exit(run(main))
