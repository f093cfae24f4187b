"""Pictures: what is accepted, and one clear sentence for everything else."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_reduce.data.images import check_image, open_image
from lit_reduce.errors import UserError


def png_header(width: int, height: int) -> bytes:
    """A PNG that only claims its size: a bomb's header, written by hand from the PNG specification."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 5)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 5))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    read = np.asarray(open_image(tmp_path / "a.png"))
    assert (np.abs(read[..., 0] - values / 257.0) <= 1).all()


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees to show
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 8)


def test_missing_folder_and_text(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name, words in [
        ("none.png", "does not exist"),
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
        (".", "folder"),
    ]:
        for read in (open_image, check_image):
            with pytest.raises(UserError, match=words) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"truncated or damaged|not an image|cannot be read"):
        open_image(path)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_bomb_is_refused_from_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    for read in (open_image, check_image):
        with pytest.raises(UserError, match="64,000,000 pixels"):
            read(tmp_path / "bomb.png")


def test_limit_is_inclusive(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", max_pixels=100).size == (10, 10)
    with pytest.raises(UserError, match="over the limit of 99"):
        open_image(tmp_path / "a.png", max_pixels=99)
