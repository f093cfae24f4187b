"""Backgrounds of scenes: photographs, gradients and textures, those of the split "unseen" apart."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lit_reduce.pocket.world import SIZE, Scene

PHOTOS = Path(__file__).parent / "photos"


def background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Returns what the things of a scene lie on: RGB, 336 x 336."""
    flat = rng.integers(200, 256, 3) if rng.random() < 0.5 else rng.integers(0, 256, 3)
    other = rng.integers(0, 256, 3)
    match scene.background:
        case "plain":
            return Image.new("RGB", (SIZE, SIZE), tuple(flat.tolist()))
        case "photo":
            return _photo(scene.unseen, flat, rng)
        case "gradient":
            return _mixed(flat, other, np.linspace(0, 1, SIZE)[:, None], rng)
        case "stripes":
            line = (np.arange(SIZE) // int(rng.integers(12, 60)) % 2)[:, None] * 1.0
            return _mixed(flat, np.clip(flat - rng.integers(15, 60), 0, 255), line, rng)
        case "noise":
            coarse = int(rng.integers(4, 40))
            grain = np.clip(flat + rng.normal(0, 28, (coarse, coarse, 3)), 0, 255).astype(np.uint8)
            return Image.fromarray(grain).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        case "radial":
            x, y = rng.uniform(0, SIZE, 2)
            return _mixed(flat, other, np.clip(_distance(x, y) / rng.uniform(150, 400), 0, 1), rng)
        case "checks":
            cell = np.arange(SIZE) // int(rng.integers(10, 50))
            dark = np.clip(flat - rng.integers(15, 60), 0, 255)
            return _mixed(flat, dark, ((cell[:, None] + cell) % 2) * 1.0, rng)
        case "dots":
            period = int(rng.integers(14, 44))
            centred = np.arange(SIZE) % period - period / 2
            inside = centred[:, None] ** 2 + centred**2 < (period * rng.uniform(0.15, 0.35)) ** 2
            return _mixed(flat, np.clip(flat - rng.integers(-60, 60, 3), 0, 255), inside * 1.0, rng)
        case _:  # clouds
            layers = [rng.normal(0, 40 / 2**k, (4 * 2**k, 4 * 2**k)) for k in range(4)]
            tall = [np.asarray(Image.fromarray(a.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                    for a in layers]  # fmt: skip
            return Image.fromarray(np.clip(flat + np.sum(tall, 0)[..., None], 0, 255).astype(np.uint8))


def _photo(unseen: bool, flat: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A part of a photograph, one in two times faded."""
    photo = photos(unseen)[int(rng.integers(len(photos(unseen))))]
    side = int(rng.uniform(110, min(photo.size)))
    left, top = (int(rng.integers(0, n - side + 1)) for n in photo.size)
    turned = list(Image.Transpose)[int(rng.integers(len(Image.Transpose)))]
    part = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        part = part.transpose(turned)
    if rng.random() < 0.5:
        part = Image.blend(part, Image.new("RGB", part.size, tuple(flat.tolist())), rng.uniform(0.1, 0.7))
    return part


def _mixed(one: np.ndarray, other: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Mixes two colours by the shares [336, 336] or [336, 1] of the other one, upright or on its side."""
    mask = Image.fromarray(np.broadcast_to(share * 255, (SIZE, SIZE)).astype(np.uint8))
    if rng.random() < 0.5:
        mask = mask.transpose(Image.Transpose.TRANSPOSE)
    below, above = (Image.new("RGB", mask.size, tuple(color.tolist())) for color in (one, other))
    return Image.composite(above, below, mask)


def _distance(x: float, y: float) -> np.ndarray:
    at = np.arange(SIZE)
    return np.asarray(np.hypot(at[:, None] - y, at - x))


@lru_cache(maxsize=2)
def photos(unseen: bool) -> tuple[Image.Image, ...]:
    """Returns the photographs that serve as backgrounds (photos/SOURCES.md names their origin)."""
    folder = PHOTOS / "unseen" if unseen else PHOTOS
    return tuple(Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg")))
