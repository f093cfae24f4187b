"""The world that pocket sees: scenes of shapes, signs and bar charts, each a pure function of (split, index)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lit_reduce_pocket.words import COLORS, DIGITS, PRINTED, SHAPES

SIZE = 336  # pixels a side, LLaVA-1.5's
PATCH = 14
GRID = SIZE // PATCH
SPLITS = {"train": 0, "val": 1, "test": 2}
# Pixels that centres lie off the middle of a patch at most: a small tower learns print ten times faster so.
JITTER = 1.5
ROOM = {"circle": 0.56, "rectangle": 0.7, "triangle": 0.36, "star": 0.36}  # share of a shape that print may fill
LARGE = 38  # pixels of diameter from which a shape is called large; none is drawn within 4 pixels of it


@dataclass(frozen=True)
class Thing:
    """One thing in a scene; lengths in pixels, (x, y) its centre."""

    kind: str  # "shape", "sign" or "bar"
    shape: str
    color: str
    x: float
    y: float
    w: float
    h: float
    angle: float = 0.0
    number: str | None = None
    word: str | None = None
    font: int = 0
    font_size: int = 0
    upper: bool = False

    @property
    def large(self) -> bool:
        """Whether the captions call it large."""
        return max(self.w, self.h) >= LARGE


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    seed: tuple[int, int]
    background: str  # "plain", "gradient", "stripes", "noise" or "photo"
    clutter: int
    things: tuple[Thing, ...]
    chart: tuple[float, float, float, float] | None = None  # left, top, right, bottom of the panel

    @property
    def shapes(self) -> list[Thing]:
        """The shapes, without signs and bars."""
        return [t for t in self.things if t.kind == "shape"]

    @property
    def signs(self) -> list[Thing]:
        """The signs."""
        return [t for t in self.things if t.kind == "sign"]

    @property
    def bars(self) -> list[Thing]:
        """The bars of the chart, left to right."""
        return [t for t in self.things if t.kind == "bar"]


def scene_rng(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """Returns the generator of one scene; streams and splits never share a state."""
    return np.random.default_rng(np.random.SeedSequence([SPLITS[split], index, stream]))


def make_scene(split: str, index: int) -> Scene:
    """Draws the content of scene `index` of a split.

    Args:
        split: "train", "val" or "test"; their seeds are disjoint, since the split is part of the seed.
        index: Any non-negative integer.
    """
    rng = scene_rng(split, index)
    seed = (SPLITS[split], index)
    background = str(rng.choice(["plain", "gradient", "stripes", "noise", "photo"], p=[0.2, 0.15, 0.1, 0.1, 0.45]))
    if rng.random() < 0.08:
        return _lonely(rng, seed)
    boxes: list[tuple[float, float, float, float]] = []
    things: list[Thing] = []
    chart = _chart(rng, boxes, things) if rng.random() < 0.5 else None
    _signs(rng, boxes, things, int(rng.integers(0, 4)))
    _shapes(rng, boxes, things, int(rng.integers(5, 15)))
    return Scene(seed, background, int(rng.integers(0, 14)), tuple(things), chart)


def _lonely(rng: np.random.Generator, seed: tuple[int, int]) -> Scene:
    """One shape of any size on a plain background, as in simple public data sets."""
    w = rng.uniform(30, 170)
    h = w if rng.random() < 0.6 else rng.uniform(40, 170)
    x, y = rng.uniform(w / 2, SIZE - w / 2), rng.uniform(h / 2, SIZE - h / 2)
    shape = str(rng.choice(SHAPES[:3] if rng.random() < 0.7 else SHAPES))
    size = h if shape == "rectangle" else w
    y = min(max(y, size / 2), SIZE - size / 2)
    return Scene(seed, "plain", 0, (Thing("shape", shape, str(rng.choice(list(COLORS))), x, y, w, size),))


def _place(
    rng: np.random.Generator, boxes: list[tuple[float, float, float, float]], w: float, h: float, gap: float = 3
) -> tuple[float, float] | None:
    """Finds a free centre for a w x h box, or None after 40 tries; the box is then taken."""
    for _ in range(40):
        x, y = rng.uniform(w / 2 + 1, SIZE - w / 2 - 1), rng.uniform(h / 2 + 1, SIZE - h / 2 - 1)
        x, y = (PATCH * (v // PATCH) + PATCH / 2 + JITTER * rng.uniform(-1, 1) for v in (x, y))
        if min(x - w / 2, y - h / 2, SIZE - x - w / 2, SIZE - y - h / 2) < 1:
            continue
        left, top, right, bottom = x - w / 2 - gap, y - h / 2 - gap, x + w / 2 + gap, y + h / 2 + gap
        if all(right < bl or left > br or bottom < bt or top > bb for bl, bt, br, bb in boxes):
            boxes.append((left, top, right, bottom))
            return x, y
    return None


def _chart(
    rng: np.random.Generator, boxes: list[tuple[float, float, float, float]], things: list[Thing]
) -> tuple[float, float, float, float] | None:
    n = int(rng.integers(3, 6))
    bar = rng.uniform(14, 20)
    step = bar + rng.uniform(5, 9)
    w, h = n * step + 14, rng.uniform(96, 128)
    spot = _place(rng, boxes, w, h)
    if spot is None:
        return None
    left, bottom = spot[0] - w / 2, spot[1] + h / 2
    low, high, second = rng.uniform(12, 18), h - rng.uniform(12, 18), rng.uniform(32, 38)
    heights = [low, high, *rng.uniform(second, high - 18, n - 2)]
    rng.shuffle(heights)
    colors = rng.choice(list(COLORS), n, replace=False)
    for i, tall in enumerate(heights):
        x = left + 7 + step * (i + 0.5)
        things.append(Thing("bar", "bar", str(colors[i]), x, bottom - 5 - tall / 2, bar, tall))
    return left, spot[1] - h / 2, spot[0] + w / 2, bottom


def _signs(
    rng: np.random.Generator, boxes: list[tuple[float, float, float, float]], things: list[Thing], n: int
) -> None:
    words = rng.choice(PRINTED, n, replace=False)
    colors = rng.choice(list(COLORS), n, replace=False)
    for word, color in zip(words, colors, strict=True):
        size = int(rng.integers(15, 25))
        upper = bool(rng.random() < 0.5)
        w, h = size * (0.74 if upper else 0.64) * len(word) + 12, size * 1.3 + 6
        spot = _place(rng, boxes, w, h)
        if spot is not None:
            font = int(rng.integers(0, 1 << 16))
            things.append(Thing("sign", "sign", str(color), *spot, w, h, 0.0, None, str(word), font, size, upper))


def _shapes(
    rng: np.random.Generator, boxes: list[tuple[float, float, float, float]], things: list[Thing], n: int
) -> None:
    # A skewed palette makes some shapes and colours single (so that "the star" means one thing) and others many.
    shape_p = _skewed(rng, len(SHAPES))
    color_p = _skewed(rng, len(COLORS))
    sizes = sorted(np.exp(rng.uniform(np.log(15), np.log(88), n)), reverse=True)
    for size in sizes:
        d = float(size)
        if abs(d - LARGE) < 4:
            d = LARGE + (4.0 if d >= LARGE else -4.0)
        number = None
        if rng.random() < 0.5:
            d = max(d, 30.0)
            number = str(rng.integers(1, 100)) if rng.random() < 0.7 else str(rng.choice(DIGITS))
        shape = str(rng.choice(SHAPES, p=shape_p))
        if number and shape in ("triangle", "star", "cross", "diamond"):
            d = max(d, 42.0)
        w = h = d
        if shape == "rectangle":
            h = max(d * rng.uniform(0.6, 1.0), 26.0 if number else 0)
        spot = _place(rng, boxes, w, h)
        if spot is None:
            continue
        room = min(w, h) * ROOM.get(shape, 0.42)
        font_size = int(np.clip(rng.uniform(0.85, 1.0) * room, 14, 26))
        color, angle = str(rng.choice(list(COLORS), p=color_p)), float(rng.uniform(-10, 10))
        font = int(rng.integers(0, 1 << 16))
        things.append(Thing("shape", shape, color, *spot, w, h, angle, number, None, font, font_size))


def _skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    p = 0.75 ** np.arange(n)
    rng.shuffle(p)
    return np.asarray(p / p.sum())
