"""Questions about a scene, with the answers that the scene itself gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lit_reduce_pocket.words import COLORS, PRINTED, SHAPES, SIDES, plural
from lit_reduce_pocket.world import SPLITS, Scene, Thing, scene_rng

CLEAR = 28.0  # pixels by which two centres differ before one is called left of (above, …) the other


@dataclass(frozen=True)
class Question:
    """One question with its answer; `family` groups the scores, `about` are the things that decide the answer."""

    family: str
    prompt: str
    answer: str
    about: tuple[Thing, ...] = ()


Asker = Callable[[Scene, np.random.Generator], Question | None]
ENDS: dict[str, Callable[[Thing], float]] = {  # the thing at an end has the smallest of these
    "leftmost": lambda t: t.x,
    "rightmost": lambda t: -t.x,
    "highest": lambda t: t.y,
    "lowest": lambda t: -t.y,
}


def ask(scene: Scene, rng: np.random.Generator, family: str) -> Question | None:
    """Asks one question of a family, or returns None where the scene has no clear one."""
    return FAMILIES[family](scene, rng)


def questions(scene: Scene, n: int, stream: int = 2) -> list[Question]:
    """Asks `n` questions (fewer on poor scenes), going through the families in a random order again and again.

    Args:
        scene: What is asked about.
        n: How many; the same one is never asked twice.
        stream: Of randomness; the questions are a function of the scene and of it.
    """
    split = list(SPLITS)[scene.seed[0]]
    rng = scene_rng(split, scene.seed[1], stream)
    out: dict[str, Question] = {}
    for _ in range(4 * n // len(FAMILIES) + 4):
        for family in rng.permutation(list(FAMILIES)):
            question = ask(scene, rng, str(family))
            if question is not None:
                out.setdefault(question.prompt, question)
            if len(out) == n:
                return list(out.values())
    return list(out.values())


def _one(things: list[Thing], rng: np.random.Generator) -> Thing | None:
    return things[int(rng.integers(len(things)))] if things else None


def _single(scene: Scene, of: Callable[[Thing], object]) -> list[Thing]:
    """Returns the shapes that are alone in what `of` says of them."""
    counts = Counter(of(t) for t in scene.shapes)
    return [t for t in scene.shapes if counts[of(t)] == 1]


def _pairs(scene: Scene) -> list[Thing]:
    return _single(scene, lambda t: (t.color, t.shape))


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    kind = int(rng.integers(3))
    if kind == 0 and (t := _one(_single(scene, lambda t: t.shape), rng)):
        return Question("attribute", f"what color is the {t.shape} ?", t.color, (t,))
    if kind == 1 and (t := _one(_single(scene, lambda t: t.color), rng)):
        return Question("attribute", f"what shape is the {t.color} object ?", t.shape, (t,))
    if t := _one([t for t in _single(scene, lambda t: t.number) if t.number], rng):
        asked, answer = ("color", t.color) if rng.random() < 0.5 else ("shape", t.shape)
        return Question("attribute", f"what {asked} is the object with number {t.number} ?", answer, (t,))
    return None


def _number(scene: Scene, rng: np.random.Generator) -> Question | None:
    t = _one([t for t in _pairs(scene) if t.number], rng)
    return Question("number", f"what number is on the {t.color} {t.shape} ?", str(t.number), (t,)) if t else None


def _word(scene: Scene, rng: np.random.Generator) -> Question | None:
    t = _one(scene.signs, rng)
    if t is None:
        return None
    if rng.random() < 0.25:
        return Question("word", f"what color is the sign with the word {t.word} ?", t.color, (t,))
    return Question("word", f"what word is on the {t.color} sign ?", str(t.word), (t,))


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    if rng.random() < 0.5:
        shape = str(rng.choice(SHAPES))
        counted = [t for t in scene.shapes if t.shape == shape]
        question = f"how many {plural(shape)} are there ?"
    elif rng.random() < 0.8:
        color = str(rng.choice(sorted({t.color for t in scene.shapes}) if rng.random() < 0.8 else list(COLORS)))
        counted = [t for t in scene.shapes if t.color == color]
        question = f"how many {color} objects are there ?"
    else:
        counted, question = scene.signs, "how many signs are there ?"
    return Question("count", question, str(len(counted)), tuple(counted)) if len(counted) <= 6 else None


def _presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    yes = rng.random() < 0.5
    if scene.signs and rng.random() < 0.25:
        there = [str(t.word) for t in scene.signs]
        word = str(rng.choice(there if yes else [w for w in PRINTED if w not in there]))
        signs = tuple(t for t in scene.signs if t.word == word)
        return Question("presence", f"is there a sign with the word {word} ?", "yes" if yes else "no", signs)
    there_pairs = sorted({(t.color, t.shape) for t in scene.shapes})
    if not there_pairs:
        return None
    if yes:
        color, shape = there_pairs[int(rng.integers(len(there_pairs)))]
    else:
        hard = rng.random() < 0.5  # both the colour and the shape are there, but not on one thing
        colors = sorted({c for c, _ in there_pairs}) if hard else list(COLORS)
        shapes = sorted({s for _, s in there_pairs}) if hard else list(SHAPES)
        absent = [(c, s) for c in colors for s in shapes if (c, s) not in there_pairs]
        if not absent:
            return None
        color, shape = absent[int(rng.integers(len(absent)))]
    found = tuple(t for t in scene.shapes if (t.color, t.shape) == (color, shape))
    return Question("presence", f"is there a {color} {shape} ?", "yes" if yes else "no", found)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = _pairs(scene)
    if len(pairs) < 2:
        return None
    for _ in range(8):
        i, j = rng.choice(len(pairs), 2, replace=False)
        a, b = pairs[i], pairs[j]
        side = str(rng.choice(SIDES))
        gap = gap_towards(side, a, b)
        if abs(gap) >= CLEAR:
            where = f"{side} of" if side in ("left", "right") else side
            answer = "yes" if gap > 0 else "no"
            return Question("relation", f"is the {a.color} {a.shape} {where} the {b.color} {b.shape} ?", answer, (a, b))
    return None


def gap_towards(side: str, a: Thing, b: Thing) -> float:
    """Returns by how many pixels ``a`` lies on that side of ``b``."""
    return {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[side]


def gap_of(question: Question) -> float:
    """Returns the gap, in pixels, that a question about a relation asks for."""
    side = next(word for word in question.prompt.split() if word in SIDES)
    return gap_towards(side, *question.about)


def _chart(scene: Scene, rng: np.random.Generator) -> Question | None:
    bars = scene.bars
    if not bars:
        return None
    kind = int(rng.integers(5))
    if kind == 0:
        return Question("chart", "how many bars are there ?", str(len(bars)), tuple(bars))
    tall = kind <= 2
    bar = max(bars, key=lambda t: t.h) if tall else min(bars, key=lambda t: t.h)
    return Question("chart", f"what color is the {'tallest' if tall else 'shortest'} bar ?", bar.color, (bar,))


def describe(t: Thing) -> str:
    """Returns the caption of one shape."""
    size = "large" if t.large else "small"
    return f"a {size} {t.color} {t.shape}" + (f" with number {t.number}" if t.number else "")


def _caption(scene: Scene, rng: np.random.Generator) -> Question | None:
    kind = int(rng.integers(3))
    if kind == 0 and (t := _one(_single(scene, lambda t: t.color), rng)):
        return Question("caption", f"describe the {t.color} object .", describe(t), (t,))
    if kind == 1 and (t := _one(_single(scene, lambda t: t.shape), rng)):
        return Question("caption", f"describe the {t.shape} .", describe(t), (t,))
    shapes = scene.shapes
    if len(shapes) < 2:
        return None
    end = str(rng.choice(list(ENDS)))
    at = ENDS[end]
    first, second = sorted(shapes, key=at)[:2]
    if at(second) - at(first) < CLEAR:
        return None
    return Question("caption", f"describe the {end} object .", describe(first), (first,))


FAMILIES: dict[str, Asker] = {
    "attribute": _attribute,
    "number": _number,
    "word": _word,
    "count": _count,
    "presence": _presence,
    "relation": _relation,
    "chart": _chart,
    "caption": _caption,
}
