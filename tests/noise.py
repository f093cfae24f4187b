"""Pictures of noise, the same from the same seed."""

import numpy as np
from PIL import Image


def noise(seed: int, width: int, height: int) -> Image.Image:
    """RGB, every value drawn evenly."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
