"""Draws scenes, and says for every patch what it shows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lit_reduce.pocket.backgrounds import background
from lit_reduce.pocket.camera import photograph
from lit_reduce.pocket.fonts import SCALE, font, text_box
from lit_reduce.pocket.shapes import Point, outline, placed, text_centre, text_view
from lit_reduce.pocket.words import COLORS
from lit_reduce.pocket.world import GRID, PATCH, SIZE, Scene, Thing

Color = tuple[int, ...]


def render(scene: Scene, side: int = SIZE) -> Image.Image:
    """Returns the picture of a scene, RGB, the same for the same scene.

    Args:
        scene: What is in it.
        side: Pixels of the picture; the scene fills it.
    """
    return photograph(draw(scene, side), np.random.default_rng([*scene.seed, 8]))


def draw(scene: Scene, side: int = SIZE) -> Image.Image:
    """Returns the picture of a scene before a camera takes it."""
    rng = np.random.default_rng([*scene.seed, 7])
    canvas = background(scene, rng).resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for _ in range(scene.clutter):
        _scribble(pen, rng)
    if scene.chart is not None:
        panel = rng.integers(215, 256, 3) if rng.random() < 0.75 else rng.integers(40, 70, 3)
        pen.rectangle([v * SCALE for v in scene.chart], fill=tuple(panel.tolist()), outline=(0, 0, 0))
    for thing in scene.things:
        _draw(canvas, pen, thing, scene.unseen, rng)
    if side == SIZE:
        return canvas.reduce(SCALE)
    return canvas.resize((side, side), Image.Resampling.BICUBIC)


def owners(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Says which thing each patch shows.

    Returns:
        Three int arrays of [24, 24] with the index of a thing or -1: the thing that the patch shows, the thing
        whose print it shows, and the thing whose centre lies in it.
    """
    centre = np.full((GRID, GRID), -1, np.int64)
    for i, thing in enumerate(scene.things):
        centre[min(int(thing.y // PATCH), GRID - 1), min(int(thing.x // PATCH), GRID - 1)] = i
    body = _most([outline(thing) for thing in scene.things])
    ink = _most([text_outline(thing, scene.unseen) if thing.text else [] for thing in scene.things])
    return body, ink, centre


def text_outline(thing: Thing, unseen: bool) -> list[Point]:
    """Returns the corners of the box around the print on a thing, in pixels."""
    left, top, right, bottom = text_box(thing.text, thing.font, thing.font_size, unseen)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return placed(text_view(thing), corners, text_centre(thing))


def _most(outlines: list[list[Point]]) -> np.ndarray:
    """Returns the outline that covers most of each patch, int of [24, 24]; -1 where none covers enough.

    Enough is a fifth of the patch, or half of what the outline covers of any patch where that is less.
    """
    half, cell, n = SIZE // 2, PATCH // 2, len(outlines) + 1
    mask = Image.new("L", (half, half))
    pen = ImageDraw.Draw(mask)
    for i, points in enumerate(outlines):
        if points:
            pen.polygon([(x / 2, y / 2) for x, y in points], fill=i + 1)
    ids = np.asarray(mask).reshape(GRID, cell, GRID, cell).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cells = np.arange(GRID * GRID)[:, None] * n + ids
    share = np.bincount(cells.reshape(-1), minlength=GRID * GRID * n).reshape(-1, n)[:, 1:] / cell**2
    if not outlines:
        return np.full((GRID, GRID), -1, np.int64)
    enough = (share >= np.minimum(0.2, 0.5 * share.max(0))) & (share > 0)
    most = np.where(enough.any(1), (share * enough).argmax(1), -1)
    return np.asarray(most.reshape(GRID, GRID))


def _draw(canvas: Image.Image, pen: ImageDraw.ImageDraw, thing: Thing, unseen: bool, rng: np.random.Generator) -> None:
    color = np.asarray(thing.shade or COLORS[thing.color])
    points = [(x * SCALE, y * SCALE) for x, y in outline(thing)]
    x, y = (min(max(int(v * SCALE), 0), SIZE * SCALE - 1) for v in (thing.x, thing.y))
    rim = _rim(color, np.asarray(canvas.getpixel((x, y)), float), rng)
    pen.polygon(points, fill=tuple(color.tolist()))
    if rng.random() < 0.15:
        _shadow(canvas, points, rng)
    if rim is not None:
        pen.line([*points, points[0], points[1]], fill=rim, width=int(rng.integers(2, 6)))
    if thing.text:
        _print(canvas, thing, _ink(color, rng), unseen)


def _rim(color: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> Color | None:
    """Chooses the colour of an edge; a thing of the colour that it lies on always has one."""
    if np.abs(behind - color).sum() >= 170 and rng.random() < 0.6:
        return None
    if rng.random() < 0.25 and np.abs(behind - color).sum() >= 170:
        return tuple((color * 0.6).astype(int).tolist())
    return (0, 0, 0) if color.sum() > 380 or (color.sum() > 100 and rng.random() < 0.3) else (255, 255, 255)


def _shadow(canvas: Image.Image, points: list[Point], rng: np.random.Generator) -> None:
    """Makes one side of a thing a little darker or lighter."""
    corners = np.array(points)
    left, top = np.floor(corners.min(0)).astype(int).tolist()
    right, bottom = np.ceil(corners.max(0)).astype(int).tolist()
    size = (max(2, right - left), max(2, bottom - top))
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], fill=int(rng.integers(40, 80)))
    ramp = Image.linear_gradient("L").resize(size)
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_180)
    empty = Image.new("L", size)
    canvas.paste((0, 0, 0) if rng.random() < 0.5 else (255, 255, 255), (left, top), Image.composite(mask, empty, ramp))


def _ink(color: np.ndarray, rng: np.random.Generator) -> Color:
    """Chooses a colour of print that stands out from the colour below."""
    light = color @ np.array([0.3, 0.59, 0.11])
    if rng.random() < 0.2:
        ink = rng.integers(0, 256, 3)
        if abs(ink @ np.array([0.3, 0.59, 0.11]) - light) > 110:
            return tuple(ink.tolist())
    return tuple((rng.integers(0, 40, 3) if light > 120 else rng.integers(220, 256, 3)).tolist())


def _print(canvas: Image.Image, thing: Thing, ink: Color, unseen: bool) -> None:
    """Prints a thing's text, seen from where the thing is seen."""
    letters = font(thing.font, thing.font_size, unseen)
    left, top, right, bottom = letters.getbbox(thing.text, anchor="mm")
    wide, high = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
    page = Image.new("L", (wide, high))
    ImageDraw.Draw(page).text((2 - left, 2 - top), thing.text, fill=255, font=letters, anchor="mm")
    corners = np.array([(x * SCALE, y * SCALE) for x, y in text_outline(thing, unseen)])
    first, last = np.floor(corners.min(0)).astype(int) - 3, np.ceil(corners.max(0)).astype(int) + 3
    x, y = text_centre(thing)
    to_page = np.array([[SCALE, 0, 2 - left], [0, SCALE, 2 - top], [0, 0, 1]])
    to_thing = np.array([[1 / SCALE, 0, first[0] / SCALE - x], [0, 1 / SCALE, first[1] / SCALE - y], [0, 0, 1]])
    back = to_page @ np.linalg.inv(text_view(thing)) @ to_thing
    seen = page.transform(tuple((last - first).tolist()), Image.Transform.PERSPECTIVE,
                          (back / back[2, 2]).reshape(-1)[:8].tolist(), Image.Resampling.BILINEAR)  # fmt: skip
    canvas.paste(ink, tuple(first.tolist()), seen)


def _scribble(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y = rng.uniform(0, SIZE * SCALE, 2)
    dx, dy = rng.uniform(-90, 90, 2)
    color = tuple(rng.integers(0, 256, 3).tolist())
    if rng.random() < 0.6:
        pen.line([(x, y), (x + dx, y + dy), (x + dy, y - dx)], fill=color, width=int(rng.integers(1, 5)))
    else:
        pen.arc([x, y, x + abs(dx) + 4, y + abs(dy) + 4], 0, float(rng.uniform(60, 360)), fill=color, width=2)
