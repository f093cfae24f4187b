"""Draws scenes, and says for every patch what it shows."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lit_reduce_pocket.words import COLORS
from lit_reduce_pocket.world import GRID, PATCH, SIZE, Scene, Thing

SCALE = 2  # drawn at twice the size, then averaged: smooth edges
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "STIXGeneral", "STIXGeneralBol", "DejaVuSans-Oblique", "cmss10",
)  # fmt: skip
PHOTOS = Path(__file__).parent / "photos"


def render(scene: Scene) -> Image.Image:
    """Returns the picture of a scene: RGB, 336 x 336, the same for the same scene."""
    rng = np.random.default_rng([*scene.seed, 7])
    image = _background(scene, rng)
    draw = ImageDraw.Draw(image)
    for _ in range(scene.clutter):
        _scribble(draw, rng)
    if scene.chart is not None:
        panel = tuple(int(v) for v in (rng.integers(215, 256, 3) if rng.random() < 0.75 else rng.integers(40, 70, 3)))
        box = [v * SCALE for v in scene.chart]
        draw.rectangle(box, fill=panel, outline=(0, 0, 0))
    for thing in scene.things:
        _draw(image, draw, thing, rng)
    return image.reduce(SCALE)


def owners(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Says which thing each patch shows.

    Returns:
        Three int arrays of [24, 24] with the index of a thing or -1: the thing that the patch shows, the thing
        whose print it shows, and the thing whose centre lies in it.
    """
    half = SIZE // 2
    body = np.zeros((len(scene.things), GRID, GRID), np.float32)
    ink = np.zeros_like(body)
    centre = np.full((GRID, GRID), -1, np.int64)
    cell = PATCH // 2
    mask = Image.new("L", (half, half))
    pen = ImageDraw.Draw(mask)
    for i, thing in enumerate(scene.things):
        pen.polygon([(x / 2, y / 2) for x, y in outline(thing)], fill=i + 1)
    ids = np.asarray(mask).reshape(GRID, cell, GRID, cell)
    for i, thing in enumerate(scene.things):
        body[i] = (ids == i + 1).mean((1, 3))
        centre[min(int(thing.y // PATCH), GRID - 1), min(int(thing.x // PATCH), GRID - 1)] = i
        text = thing.number or thing.word
        if text:
            ink[i] = _overlap(_text_box(thing, text))
    best = body.max((1, 2), keepdims=True) if len(body) else body
    seen = (body >= np.minimum(0.2, 0.5 * best)) & (body > 0)
    shown = np.where(seen.any(0), (body * seen).argmax(0), -1) if len(body) else centre
    inked = ink >= np.minimum(0.2, 0.5 * ink.max((1, 2), keepdims=True) + 1e-6) if len(ink) else ink.astype(bool)
    printed = np.where(inked.any(0), (ink * inked).argmax(0), -1) if len(ink) else centre
    return shown, printed, centre


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Returns the corner points of a thing, in pixels."""
    hw, hh = thing.w / 2, thing.h / 2
    match thing.shape:
        case "circle":
            pts = [(hw * math.cos(a), hh * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40, endpoint=False)]
        case "triangle":
            pts = [(0, -hh), (hw, hh), (-hw, hh)]
        case "diamond":
            pts = [(0, -hh), (hw * 0.8, 0), (0, hh), (-hw * 0.8, 0)]
        case "star":
            radii = [(1.0, 0.45)[i % 2] for i in range(10)]
            turn = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
            pts = [(hw * r * math.cos(a), hh * r * math.sin(a)) for r, a in zip(radii, turn, strict=True)]
        case "cross":
            t = 0.36
            arms = [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t)]
            pts = [(x * hw, y * hh) for x, y in [*arms, (-t, -t)]]
        case _:
            pts = [(-hw, -hh), (hw, -hh), (hw, hh), (-hw, hh)]
    if thing.angle:
        c, s = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        pts = [(c * x - s * y, s * x + c * y) for x, y in pts]
    return [(thing.x + x, thing.y + y) for x, y in pts]


def _draw(image: Image.Image, draw: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    base = np.asarray(COLORS[thing.color], float)
    color = np.clip(base + rng.uniform(-10, 10, 3), 0, 255).astype(int)
    pts = [(x * SCALE, y * SCALE) for x, y in outline(thing)]
    cx, cy = int(thing.x * SCALE), int(thing.y * SCALE)
    behind = np.asarray(image.getpixel((min(max(cx, 0), image.width - 1), min(max(cy, 0), image.height - 1))), float)
    rim: tuple[int, ...] | None = None
    if np.abs(behind - color).sum() < 150 or rng.random() < 0.4:  # never the colour of what it lies on
        rim = (0, 0, 0) if color.sum() > 380 or (color.sum() > 60 and rng.random() < 0.3) else (255, 255, 255)
    draw.polygon(pts, fill=tuple(int(v) for v in color))
    if rim is not None:
        draw.line([*pts, pts[0], pts[1]], fill=rim, width=2)
    text = thing.number or thing.word
    if text:
        light = color @ np.array([0.3, 0.59, 0.11]) > 120
        ink = rng.integers(0, 30, 3) if light else rng.integers(225, 256, 3)
        draw.text(
            (thing.x * SCALE, _text_y(thing) * SCALE), text.upper() if thing.upper else text,
            font=_font(thing.font, thing.font_size), fill=tuple(int(v) for v in ink), anchor="mm",
        )  # fmt: skip


def _text_y(thing: Thing) -> float:
    return thing.y + (thing.h * 0.17 if thing.shape == "triangle" else thing.h * 0.03 if thing.shape == "star" else 0)


def _text_box(thing: Thing, text: str) -> tuple[float, float, float, float]:
    left, top, right, bottom = _font(thing.font, thing.font_size).getbbox(
        text.upper() if thing.upper else text, anchor="mm"
    )
    y = _text_y(thing)
    return thing.x + left / SCALE, y + top / SCALE, thing.x + right / SCALE, y + bottom / SCALE


def _overlap(box: tuple[float, float, float, float]) -> np.ndarray:
    """Returns the share of each patch that a box covers, [24, 24]."""
    edges = np.arange(GRID + 1) * PATCH
    across = np.clip(np.minimum(box[2], edges[1:]) - np.maximum(box[0], edges[:-1]), 0, None)
    down = np.clip(np.minimum(box[3], edges[1:]) - np.maximum(box[1], edges[:-1]), 0, None)
    return np.asarray(down[:, None] * across[None] / PATCH**2, np.float32)


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    full = SIZE * SCALE
    flat = tuple(int(v) for v in (rng.integers(200, 256, 3) if rng.random() < 0.6 else rng.integers(0, 256, 3)))
    if scene.background == "plain":
        return Image.new("RGB", (full, full), flat)
    if scene.background == "photo":
        photo = photos()[int(rng.integers(len(photos())))]
        side = int(rng.uniform(120, min(photo.size)))
        left, top = (int(rng.integers(0, n - side + 1)) for n in photo.size)
        crop = photo.crop((left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop.resize((full, full), Image.Resampling.BILINEAR)
    other = rng.integers(0, 256, 3)
    if scene.background == "gradient":
        ramp = np.linspace(0, 1, full)[:, None, None]
        wide = np.broadcast_to(np.asarray(flat) * (1 - ramp) + other * ramp, (full, full, 3))
        return Image.fromarray((wide if rng.random() < 0.5 else wide.swapaxes(0, 1)).astype(np.uint8))
    if scene.background == "stripes":
        period = int(rng.integers(12, 60)) * SCALE
        line = (np.arange(full) // period % 2)[:, None, None] * 1.0
        dark = np.clip(np.asarray(flat) - rng.integers(15, 60), 0, 255)
        wide = np.broadcast_to(np.asarray(flat) * (1 - line) + dark * line, (full, full, 3))
        return Image.fromarray((wide if rng.random() < 0.5 else wide.swapaxes(0, 1)).astype(np.uint8))
    coarse = int(rng.integers(4, 40))
    grain = np.clip(np.asarray(flat) + rng.normal(0, 28, (coarse, coarse, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(grain).resize((full, full), Image.Resampling.BICUBIC)


def _scribble(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y = rng.uniform(0, SIZE * SCALE, 2)
    dx, dy = rng.uniform(-90, 90, 2)
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    if rng.random() < 0.6:
        draw.line([(x, y), (x + dx, y + dy), (x + dy, y - dx)], fill=color, width=int(rng.integers(1, 5)))
    else:
        draw.arc([x, y, x + abs(dx) + 4, y + abs(dy) + 4], 0, float(rng.uniform(60, 360)), fill=color, width=2)


@lru_cache(maxsize=1)
def photos() -> tuple[Image.Image, ...]:
    """Returns the photographs that serve as backgrounds (photos/SOURCES.md names their origin)."""
    return tuple(Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg")))


@lru_cache(maxsize=512)
def _font(which: int, size: int) -> ImageFont.FreeTypeFont:
    name = FONTS[which % len(FONTS)]
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size * SCALE)
