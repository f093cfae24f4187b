"""Pictures of 16 or 32 bits, or of floats, with the 8 bits a channel that processors read."""

import numpy as np
from PIL import Image

UNSIGNED = 1
SAMPLE_FORMAT = 339  # a TIFF tag


def to_eight_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """A grey picture of mode I, I;16 or F as L; every other one as it is.

    Formats that do not say what white is get the narrowest range that holds the largest value: 1 (floats alone), 8, 16
    or 32 bits. Values outside of the range are cut; NaN is black.

    Args:
        image: The picture.
        file: What it was read from; it tells the format.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    tags = getattr(file, "tag_v2", {})
    if image.mode == "I" and file.format == "TIFF" and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)  # Pillow reads them as signed
    if image.mode == "F":
        values = np.nan_to_num(values, posinf=float(np.finfo(np.float32).max))
    top = float(values.max(initial=0))
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format in ("PNG", "PPM")):
        scale = 1 / 256
    elif image.mode == "F" and top <= 1:
        scale = 255.0
    else:
        scale = 1.0 if top <= 255 else 1 / 256 if top <= 65535 else 2.0**-24 if values.dtype == np.uint32 else 2.0**-23
    return Image.fromarray((values.astype(np.float32) * scale).clip(0, 255).astype(np.uint8))
