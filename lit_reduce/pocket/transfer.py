"""A second, small renderer: does pocket see, or does it know its world? Nothing is ever trained or chosen on it.

Things have the names of pocket's world and nothing else of it: shapes are level sets instead of polygons, signs are
octagons and ellipses on poles, charts have axes instead of panels; palettes, typefaces, backgrounds and the way things
are placed are others. The 500 questions on 250 scenes are listed in transfer.jsonl; the pictures are drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lit_reduce.data.groups import Group
from lit_reduce.data.jsonl import Row
from lit_reduce.pocket.questions import FAMILIES, Question, ask
from lit_reduce.pocket.words import PRINTED, SHAPES
from lit_reduce.pocket.world import LARGE, SIZE, Scene, Thing

SCENES, EACH = 250, 2  # pictures, and questions on each
FINE = 2  # drawn at so many times the size
CELLS = 5  # things lie in cells of a grid of so many a side
PALETTES: tuple[dict[str, str], ...] = (  # matplotlib's, Material's, and one of felt pens
    {"red": "#d62728", "green": "#2ca02c", "blue": "#1f5fb4", "yellow": "#f0e442", "purple": "#8a4fbd",
     "orange": "#ff7f0e", "black": "#101010", "white": "#ffffff", "gray": "#7f7f7f", "teal": "#0f9b9b",
     "brown": "#8c4a35"},
    {"red": "#f44336", "green": "#4caf50", "blue": "#2979ff", "yellow": "#ffeb3b", "purple": "#9c27b0",
     "orange": "#ff9800", "black": "#212121", "white": "#fafafa", "gray": "#9e9e9e", "teal": "#009688",
     "brown": "#795035"},
    {"red": "#c8102e", "green": "#007a33", "blue": "#0033a0", "yellow": "#ffd100", "purple": "#5f259f",
     "orange": "#fe6a13", "black": "#000000", "white": "#f4f4ee", "gray": "#8a8d8f", "teal": "#007c80",
     "brown": "#6b3d1f"},
)  # fmt: skip
TYPEFACES = (None, "cmr10", "cmb10", "cmtt10")  # Pillow's own, then matplotlib's


def transfer_scene(index: int) -> Scene:
    """Draws the content of one of the scenes, a pure function of its number."""
    rng = np.random.default_rng([20261201, index])
    palette = PALETTES[index % len(PALETTES)]
    colors = [str(c) for c in rng.permutation(list(palette))]
    pitch = SIZE / CELLS
    cells = [(r, c) for r in range(CELLS) for c in range(CELLS)]
    things: list[Thing] = []
    if rng.random() < 0.5:
        row, column = int(rng.integers(CELLS - 1)), int(rng.integers(CELLS - 1))
        cells = [(r, c) for r, c in cells if r not in (row, row + 1) or c not in (column, column + 1)]
        things += _bars(rng, colors, column * pitch, row * pitch, 2 * pitch)
    order = rng.permutation(len(cells))
    words = rng.permutation(PRINTED)
    kinds, share = [str(s) for s in rng.permutation(SHAPES)], 0.7 ** np.arange(len(SHAPES))
    for n, at in enumerate(order[: int(rng.integers(8, 15))]):
        row, column = cells[at]
        x, y = (pitch * (v + 0.5) + rng.uniform(-4, 4) for v in (column, row))
        which = int(rng.integers(len(TYPEFACES)))
        if n < index % 3:
            text = 17 if len(words[n]) > 4 else 20
            things.append(Thing("sign", "sign", colors[n], x, y, 58, 36, 0.0, None, str(words[n]), which, text))
            continue
        shape, number = str(rng.choice(kinds, p=share / share.sum())), None
        d = rng.uniform(18, LARGE - 5) if rng.random() < 0.4 else rng.uniform(LARGE + 5, 58)
        if rng.random() < 0.5:
            number, d = str(rng.integers(0, 100)), rng.uniform(48, 58)
        h = d * rng.uniform(0.7, 0.9) if shape == "rectangle" else d
        size = int(d * {"circle": 0.48, "rectangle": 0.48, "star": 0.32, "cross": 0.32}.get(shape, 0.38))
        color = colors[int(min(rng.geometric(0.25), len(colors))) - 1]
        turn = float(rng.uniform(-9, 9))
        things.append(Thing("shape", shape, color, x, y, d, h, turn, number, None, which, max(16, size)))
    return Scene((0, index), ("plain", "lined", "diagonal", "confetti")[index % 4], 0, tuple(things))


def transfer_picture(scene: Scene) -> Image.Image:
    """Returns the picture of a scene: RGB, 336 x 336."""
    rng = np.random.default_rng([20261202, scene.seed[1]])
    canvas = _paper(scene.background, rng)
    for thing in scene.things:
        _fill(canvas, thing, PALETTES[scene.seed[1] % len(PALETTES)], rng)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    if scene.bars:
        left, right = (f(t.x for t in scene.bars) + s * 16 for f, s in ((min, -1), (max, 1)))
        low, high = max(t.y + t.h / 2 for t in scene.bars), min(t.y - t.h / 2 for t in scene.bars) - 6
        ink = (0, 0, 0) if canvas.mean() > 120 else (255, 255, 255)
        pen.line([(v * FINE, w * FINE) for v, w in ((left, high), (left, low), (right, low))], fill=ink, width=3)
    for thing in scene.things:
        if thing.text:
            below = canvas[int(thing.y * FINE), int(thing.x * FINE)] @ np.array([0.3, 0.59, 0.11])
            drop = thing.h * 0.16 if thing.shape == "triangle" else 0
            word = thing.text.capitalize() if thing.font % 2 else thing.text
            pen.text((thing.x * FINE, (thing.y + drop) * FINE), word, fill=(0, 0, 0) if below > 130 else (255,) * 3,
                     font=_typeface(thing.font, thing.font_size), anchor="mm")  # fmt: skip
    return image.reduce(FINE)


def transfer_questions(index: int) -> tuple[Scene, list[Question]]:
    """Returns a scene and its questions, of families that go on from scene to scene."""
    scene, rng, out = transfer_scene(index), np.random.default_rng([20261203, index]), list[Question]()
    families = list(FAMILIES)
    first = index * EACH % len(families)
    for family in families[first:] + families[:first]:
        question = ask(scene, rng, family)
        if question is not None and len(out) < EACH:
            out.append(question)
    return scene, out


def transfer_groups() -> Iterator[tuple[Group, list[str]]]:
    """Yields all pictures with their questions, and the family of each."""
    for scene, asked in map(transfer_questions, range(SCENES)):
        turns = tuple((q.prompt, q.answer) for q in asked)
        yield Group(f"transfer-{scene.seed[1]}", partial(transfer_picture, scene), turns), [q.family for q in asked]


def transfer_rows(count: int) -> Iterator[Row]:
    """Yields the first so many of the questions, scene by scene."""
    every = ((scene, q) for scene, asked in map(transfer_questions, range(SCENES)) for q in asked)
    for _, (scene, q) in zip(range(count), every, strict=False):
        yield Row(q.prompt, transfer_picture(scene), q.answer, family=q.family, source=f"transfer/{scene.seed[1]}")


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Says which points of the square from -1 to 1 lie in a shape; u goes right and v goes down."""
    across, along, radius = np.abs(u), np.abs(v), np.hypot(u, v)
    squared = np.maximum(across, along)
    match shape:
        case "circle":
            depth = radius
        case "triangle":
            depth = np.maximum(2 * across - v, v + 0.1)
        case "star":  # five sharp tips with hollow sides
            depth = radius / (0.46 + 0.54 * (1 - np.abs(np.sin(2.5 * np.arctan2(u, -v)))) ** 1.3)
        case "cross":  # arms that widen outwards
            depth = np.maximum(squared, np.minimum(across - 0.14 * along, along - 0.14 * across) / 0.24)
        case "diamond":
            depth = (across / 0.78) ** 1.12 + along**1.12
        case "octagon":
            depth = np.maximum(squared, (across + along) / 1.45)
        case _:  # a rectangle with soft corners
            depth = across**8 + along**8
    return np.asarray(depth < 1)


def _fill(canvas: np.ndarray, thing: Thing, palette: dict[str, str], rng: np.random.Generator) -> None:
    """Fills a thing, most of them with an edge of another colour."""
    edge = float(rng.choice([0.0, 1.5, 3.0])) if thing.kind != "bar" else 1.0
    shape = str(rng.choice(["octagon", "circle", "rectangle"])) if thing.kind == "sign" else thing.shape
    color = np.array(_rgb(palette[thing.color]))
    behind = canvas[int(thing.y * FINE), int(thing.x * FINE)].astype(int)
    if np.abs(behind - color).sum() < 150:
        edge = 3.0
    border = np.array((0, 0, 0) if color.sum() > 300 else (255, 255, 255))
    if thing.kind == "sign":  # its pole
        top, left = int(thing.y * FINE), int(thing.x * FINE)
        canvas[top : top + 30 * FINE, left - 3 : left + 3] = 90
    reach = max(thing.w, thing.h) * 0.8 + 4
    columns, rows = ((np.arange(max(0, int((m - reach) * FINE)), min(SIZE * FINE, int((m + reach) * FINE))))
                     for m in (thing.x, thing.y))  # fmt: skip
    x, y = (columns[None] + 0.5) / FINE - thing.x, (rows[:, None] + 0.5) / FINE - thing.y
    c, s = np.cos(np.radians(thing.angle)), np.sin(np.radians(thing.angle))
    x, y = c * x + s * y, c * y - s * x
    part = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part[inside(shape, x / (thing.w / 2), y / (thing.h / 2))] = border if edge else color
    part[inside(shape, x / (thing.w / 2 - edge), y / (thing.h / 2 - edge))] = color


def _bars(rng: np.random.Generator, colors: list[str], left: float, top: float, side: float) -> list[Thing]:
    """Three or four bars on an axis at the foot of a square, clearly different at both ends."""
    n = int(rng.integers(3, 5))
    tall = rng.permutation([14.0, *rng.uniform(36, 74, n - 2), side - 26.0])
    foot, step = top + side - 10, (side - 20) / n
    return [Thing("bar", "bar", colors[-1 - i], left + 12 + step * (i + 0.5), foot - tall[i] / 2, step * 0.6, tall[i])
            for i in range(n)]  # fmt: skip


def _paper(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Backgrounds, [672, 672, 3] bytes."""
    side = SIZE * FINE
    base = rng.integers(175, 250, 3) if rng.random() < 0.75 else rng.integers(25, 90, 3)
    canvas = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
    at = np.arange(side)
    if kind == "lined":
        canvas[at % (20 * FINE) < FINE] -= 22
    elif kind == "diagonal":
        canvas += ((at[:, None] + at) / side * 40 - 40)[..., None]
    elif kind == "confetti":
        for _ in range(60):
            x, y, r = *rng.uniform(0, side, 2), rng.uniform(5, 30)
            rows, columns = (slice(int(max(0, v - r)), int(v + r)) for v in (y, x))
            canvas[rows, columns] += rng.uniform(-24, 24, 3)
    return np.asarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _rgb(code: str) -> tuple[int, int, int]:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


@lru_cache(maxsize=256)
def _typeface(which: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    name = TYPEFACES[which]
    if name is None:
        return ImageFont.load_default(size * FINE)
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size * FINE)
