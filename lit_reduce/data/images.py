"""Open a user's picture, or say in one line why that cannot be done."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lit_reduce.errors import UserError

MAX_PIXELS = 64_000_000
"""Pictures above this many pixels are refused before they are decoded (a small file can hold a huge picture)."""


def check_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
    """Read only the header of a picture: is it there, is it a picture, is it small enough?

    Raises:
        UserError: The file is missing, unreadable, not an image, or has more than ``max_pixels`` pixels.
    """
    _header(Path(path), max_pixels).close()


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, upright (its EXIF orientation applied); transparency is laid on white.

    Args:
        path: An image file in any format that Pillow reads; of an animation, the first frame.
        max_pixels: The largest width x height that is decoded.

    Raises:
        UserError: As :func:`check_image`, or the data end too early.
    """
    path = Path(path)
    with _header(path, max_pixels) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
                upright = upright.point(lambda value: value * (1 / 256)).convert("L")  # 16 bits; RGB alone would clip
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                paper = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(paper, upright).convert("RGB")
            return upright.convert("RGB")
        # Pillow's decoders raise many kinds on damaged data; each of them means the same to the user.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
            raise UserError(f"image {path} is truncated or damaged: {error}") from error


def _header(path: Path, max_pixels: int) -> Image.Image:
    """The opened, not yet decoded picture, its size checked."""
    if path.is_dir():
        raise UserError(f"image {path} is a folder, not a file")
    try:
        with warnings.catch_warnings():
            # Our own limit below decides, with our own sentence.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"image {path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is over the limit of {max_pixels:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that can be read (PNG, JPEG, WebP, ...)") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UserError(
            f"image {path} has {width} x {height}, over the limit of {max_pixels:,} pixels: make it smaller"
        )
    return image
