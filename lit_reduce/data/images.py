"""Open a user's picture, or say in one line why that cannot be done."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lit_reduce.backbones.thin import check_ratio
from lit_reduce.data.depths import to_eight_bits
from lit_reduce.errors import UserError
from lit_reduce.files import check_plain

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, by content; Pillow would also start Ghostscript for PostScript, whatever the file is called."""
MAX_BYTES = 1 << 29
MAX_PIXELS = 64_000_000
"""Pictures above this many pixels are refused before they are decoded (a small file can hold a huge picture)."""


def check_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
    """Read only the header of a picture: is it there, is it a picture, is its size right?

    Raises:
        UserError: The file is missing, unreadable, no image of a known format, has more than ``max_pixels`` pixels, or
            is too thin.
    """
    _header(Path(path), max_pixels).close()


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, upright (its EXIF orientation applied); transparency is laid on white.

    Args:
        path: An image file in one of the `FORMATS`; of an animation, the first frame.
        max_pixels: The largest width x height that is decoded.

    Raises:
        UserError: As :func:`check_image`, or the data end too early.
    """
    path = Path(path)
    with _header(path, max_pixels) as image:
        try:
            image.load()
            upright = to_eight_bits(ImageOps.exif_transpose(image), image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                paper = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(paper, upright).convert("RGB")
            return upright.convert("RGB")
        # Decoders raise many kinds on damaged data, RuntimeError too; each of them means the same to the user.
        except Exception as error:
            raise UserError(f"image {path} is truncated or damaged: {_brief(error)}") from error


def _header(path: Path, max_pixels: int) -> Image.Image:
    """The opened, not yet decoded picture, its size checked."""
    Image.init()
    try:
        if path.is_dir():
            raise UserError(f"image {path} is a folder, not a file")
        check_plain(path, MAX_BYTES)
        with warnings.catch_warnings():
            # Our own limit below decides, with our own sentence.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"image {path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is over the limit of {max_pixels:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # as in open_image
        raise UserError(f"image {path} cannot be read: {_brief(error)}") from error
    width, height = image.size
    try:
        if width * height > max_pixels:
            raise UserError(f"{width} x {height} is over the limit of {max_pixels:,} pixels: make it smaller")
        check_ratio(width, height)
    except UserError as error:
        image.close()
        raise UserError(f"image {path}: {error}") from error
    return image


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
