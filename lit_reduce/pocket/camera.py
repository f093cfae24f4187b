"""What a camera does to a drawn picture: light, blur, coarse pixels, noise and JPEG."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter


def photograph(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns the picture with some of the faults that pictures have; colours keep their names, print stays legible."""
    chances = rng.random(5)
    if chances[0] < 0.4:
        gains, gamma = rng.uniform(0.88, 1.08) * rng.uniform(0.95, 1.05, 3), rng.uniform(0.85, 1.18)
        ramp = (np.arange(256) / 255) ** gamma * 255
        image = image.point(np.clip(ramp * gains[:, None], 0, 255).astype(int).reshape(-1).tolist())
    if chances[1] < 0.3:
        side = round(image.width * rng.uniform(0.58, 0.95))
        way = Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.BILINEAR
        image = image.resize((side, side), way).resize(image.size, way)
    elif chances[2] < 0.3:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.75) * image.width / 336))
    if chances[3] < 0.25:
        strength = int(rng.integers(3, 14))
        grain = rng.integers(-strength, strength + 1, (image.height, image.width, 3), dtype=np.int16)
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    if chances[4] < 0.4:
        stream = BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(35, 93)))
        image = Image.open(stream).convert("RGB")
    return image
