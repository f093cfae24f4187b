"""How good pocket is on pictures it has never seen: ``python -m lit_reduce.pocket.quality``.

An answer counts as right when every token of it, its end included, is the most likely one: what greedy decoding would
give. All questions about a picture share one pass.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lit_reduce.backbones import Backbone, load
from lit_reduce.console import run
from lit_reduce.data.groups import Group
from lit_reduce.distill.teacher import Teacher, answer_rows
from lit_reduce.evaluate.bootstrap import interval
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.files import write_atomic
from lit_reduce.pocket.easy import easy_image, easy_rows
from lit_reduce.pocket.questions import questions
from lit_reduce.pocket.render import render
from lit_reduce.pocket.transfer import SCENES, transfer_groups
from lit_reduce.pocket.world import SIZE, Scene, make_scene
from lit_reduce.settings import BackboneSettings, configs_dir, resolve

Asked = tuple[Group, list[str]]  # a picture with its questions, and the family of each


@dataclass
class QualitySettings:
    """Settings of the measurement; configs/quality.yaml explains each."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    split: str = "test"
    scenes: int = 2000
    turns: int = 16
    easy: int = 1000
    robust: int = 500
    transfer: int = SCENES
    out: str = "outputs/quality.json"


def moved(scene: Scene, right: int, down: int) -> Image.Image:
    """Returns the picture of a scene moved by so many pixels; what comes in repeats the edge."""
    pixels = np.asarray(render(scene))
    return Image.fromarray(np.pad(pixels, ((down, 0), (right, 0), (0, 0)), "edge")[:SIZE, :SIZE])


SIGHTS: dict[str, Callable[[Scene], Image.Image]] = {
    "as they are": render,
    "moved by (3, 5)": partial(moved, right=3, down=5),
    "moved by (7, 7)": partial(moved, right=7, down=7),
    "672 px": partial(render, side=672),
    "200 px": partial(render, side=200),
}
"""Pictures of the same scenes on which answers shall stay the same."""


def scene_questions(
    split: str, count: int, turns: int, see: Callable[[Scene], Image.Image] = render
) -> Iterator[Asked]:
    """Yields scenes with their questions."""
    for index in range(count):
        scene = make_scene(split, index)
        asked = questions(scene, turns)
        pairs = tuple((q.prompt, q.answer) for q in asked)
        yield Group(f"{split}-{index}", partial(see, scene), pairs), [q.family for q in asked]


def easy_questions(split: str, count: int) -> Iterator[Asked]:
    """Yields pictures of easy-VQA with their questions."""
    for path, turns in easy_rows("test" if split == "test" else "val")[:count]:
        yield Group(path, partial(easy_image, path), tuple(turns)), ["easy-vqa"] * len(turns)


def score(backbone: Backbone, asked: Iterable[Asked]) -> dict[str, list[float]]:
    """Returns family -> 1.0 or 0.0 for each of its questions."""
    teacher = Teacher(backbone, [0])
    out: dict[str, list[float]] = defaultdict(list)
    for group, families in asked:
        found = teacher.outputs(group)
        answers = found["suffix"][answer_rows(found["lengths"]) + 1]
        right = found["top_ids"][:, 0] == answers
        for family, tokens in zip(families, right.split(found["lengths"][:, 1].tolist()), strict=True):
            out[family].append(float(tokens.all()))
    return out


@torch.inference_mode()
def blind(backbone: Backbone, asked: Iterable[Asked], batch: int = 256) -> list[float]:
    """Returns 1.0 or 0.0 for each question when the model is not shown the picture."""
    turns = [turn for group, _ in asked for turn in group.turns]
    out: list[float] = []
    for start in range(0, len(turns), batch):
        part = turns[start : start + batch]
        inputs = backbone.prepare([None] * len(part), [prompt for prompt, _ in part])
        answers = backbone.decode(backbone.model.generate(**inputs, do_sample=False, max_new_tokens=16), inputs)
        out += [float(is_correct(a, str(right))) for a, (_, right) in zip(answers, part, strict=True)]
    return out


def quality(chosen: QualitySettings) -> dict[str, Any]:
    """Measures everything that docs report of pocket, each share of right answers with a 95 % interval.

    Overall, by family, without the picture, on easy-VQA, on other views of the same scenes, on typefaces and
    backgrounds never seen, and on another renderer's pictures.
    """
    backbone = load(chosen.backbone.name, chosen.backbone.dtype, chosen.backbone.device, chosen.backbone.revision)
    scenes = tqdm(scene_questions(chosen.split, chosen.scenes, chosen.turns), total=chosen.scenes, desc="scenes")
    families = score(backbone, scenes)
    everything = _flat(families)
    blind_scenes = scene_questions(chosen.split, min(chosen.scenes, 500), chosen.turns)
    rows = {"all families": everything, **dict(sorted(families.items()))}
    rows["without the picture"] = blind(backbone, blind_scenes)
    if chosen.easy:
        easy = tqdm(easy_questions(chosen.split, chosen.easy), total=chosen.easy, desc="easy-vqa")
        rows |= score(backbone, easy)
        rows["easy-vqa without the picture"] = blind(backbone, easy_questions(chosen.split, chosen.easy))
    for name, see in SIGHTS.items() if chosen.robust else ():
        views = scene_questions(chosen.split, chosen.robust, chosen.turns, see)
        rows[f"{chosen.robust} scenes {name}"] = _flat(score(backbone, tqdm(views, total=chosen.robust, desc=name)))
    if chosen.robust:
        strange = tqdm(scene_questions("unseen", chosen.robust, chosen.turns), total=chosen.robust, desc="unseen")
        rows["typefaces and backgrounds never seen"] = _flat(score(backbone, strange))
    if chosen.transfer:
        other = tqdm(islice(transfer_groups(), chosen.transfer), total=chosen.transfer, desc="transfer")
        rows["transfer set"] = _flat(score(backbone, other))
    return {"backbone": backbone.identity.id, "split": chosen.split, "scenes": chosen.scenes,
            "rows": {name: _entry(values) for name, values in rows.items()}}  # fmt: skip


def _flat(families: Mapping[str, Sequence[float]]) -> list[float]:
    return [x for values in families.values() for x in values]


def _entry(values: Sequence[float]) -> dict[str, float]:
    low, high = interval(torch.tensor(values, dtype=torch.float64))
    return {"accuracy": sum(values) / len(values), "low": low, "high": high, "questions": len(values)}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| questions | number | accuracy, % [95 % interval] |", "|---|---|---|"]
    for name, e in report["rows"].items():
        span = f"{100 * e['accuracy']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"
        lines.append(f"| {name} | {e['questions']} | {span} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Resolves the settings, measures, prints and writes."""
    chosen = resolve(QualitySettings, argv, configs_dir(), "quality")
    report = quality(chosen)
    write_atomic(Path(chosen.out), json.dumps(report, indent=2) + "\n")
    print(table(report), end="")


if __name__ == "__main__":
    sys.exit(run(main))
