"""How good pocket is on pictures it has never seen: ``python -m lit_reduce_pocket.quality``.

An answer counts as right when every token of it, its end included, is the most likely one: what greedy decoding would
give. All questions about a picture share one pass.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.console import run
from lit_reduce.data.groups import Group
from lit_reduce.distill.teacher import Teacher, answer_rows
from lit_reduce.evaluate.bootstrap import interval
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.files import write_atomic
from lit_reduce.options import option
from lit_reduce.settings import BackboneSettings, configs_dir, resolve
from lit_reduce_pocket.easy import easy_image, easy_rows
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import make_scene

Asked = tuple[Group, list[str]]  # a picture with its questions, and the family of each


@dataclass
class QualitySettings:
    """Measure the reference backbone on held-out pictures.

    python -m lit_reduce_pocket.quality
    """

    backbone: BackboneSettings = option(BackboneSettings, "the backbone that is measured")
    split: str = option("test", "choose on val, report on test", choices=("test", "val"))
    scenes: int = option(2000, "rendered scenes", min=1)
    turns: int = option(16, "questions on each", min=1)
    easy: int = option(1000, "pictures of easy-VQA's test split; 0 leaves it out", min=0)
    out: str = option("outputs/quality.json", "the report")


def scene_questions(split: str, count: int, turns: int) -> Iterator[Asked]:
    """Yields scenes with their questions."""
    for index in range(count):
        scene = make_scene(split, index)
        asked = questions(scene, turns)
        pairs = tuple((q.prompt, q.answer) for q in asked)
        yield Group(f"{split}-{index}", partial(render, scene), pairs), [q.family for q in asked]


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


def quality(settings: QualitySettings) -> dict[str, Any]:
    """Measures overall, by family, on easy-VQA and without the picture; each with a 95 % interval."""
    given = settings.backbone
    backbone = load_backbone(given.name, given.dtype, given.device, given.revision)
    scenes = scene_questions(settings.split, settings.scenes, settings.turns)
    families = score(backbone, tqdm(scenes, total=settings.scenes, desc="scenes"))
    everything = [x for values in families.values() for x in values]
    blind_scenes = scene_questions(settings.split, min(settings.scenes, 500), settings.turns)
    rows = {"all families": everything, **dict(sorted(families.items()))}
    rows["without the picture"] = blind(backbone, blind_scenes)
    if settings.easy:
        easy = tqdm(easy_questions(settings.split, settings.easy), total=settings.easy, desc="easy-vqa")
        rows |= score(backbone, easy)
        rows["easy-vqa without the picture"] = blind(backbone, easy_questions(settings.split, settings.easy))
    return {"backbone": backbone.identity.id, "split": settings.split, "scenes": settings.scenes,
            "rows": {name: _entry(values) for name, values in rows.items()}}  # fmt: skip


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
    settings = resolve(QualitySettings, argv, configs_dir(), "quality")
    report = quality(settings)
    write_atomic(Path(settings.out), json.dumps(report, indent=2) + "\n")
    print(table(report), end="")


if __name__ == "__main__":
    sys.exit(run(main))
