"""Pictures: what is accepted, and one clear sentence for everything else."""

import os
import struct
import warnings
import zlib
from contextlib import suppress
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


GREYS = np.arange(256).reshape(16, 16)  # all grey values


def as_pgm(values: np.ndarray, top: int) -> bytes:
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], top) + values.astype(">u2").tobytes()


def as_tiff(values: np.ndarray, kind: int) -> bytes:
    """A grey TIFF of 32 bits, by hand from the TIFF 6.0 specification; kind 1: unsigned, 2: signed, 3: float."""
    rows, columns = values.shape
    fields = [(256, columns), (257, rows), (258, 32), (259, 1), (262, 1), (273, 8 + 2 + 10 * 12 + 4), (277, 1),
              (278, rows), (279, values.nbytes), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0" * 4 + values.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        as_pgm(GREYS * 257, 65535),
        as_pgm(np.rint(GREYS * 1023 / 255), 1023),
        as_tiff((GREYS * 0x01010101).astype("<u4"), 1),
        as_tiff((GREYS * 0x00808080).astype("<i4"), 2),
        as_tiff((GREYS * 257).astype("<i4"), 2),
        as_tiff(GREYS.astype("<u4"), 1),
        as_tiff((GREYS / 255).astype("<f4"), 3),
        as_tiff(GREYS.astype("<f4"), 3),
        as_tiff(np.where(GREYS == 0, np.nan, GREYS).astype("<f4"), 3),
    ],
)
def test_deep_grey_pictures_keep_their_values(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)  # the content decides, not the name
    read = np.asarray(open_image(tmp_path / "a.png")).astype(int)
    assert np.abs(read - GREYS[..., None]).max() <= 1
    assert abs(read.mean() - 127.5) < 0.6


def test_postscript_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "e.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    for read in (check_image, open_image):
        with pytest.raises(UserError, match="not an image that can be read"):
            read(tmp_path / "e.png")


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 200_000), (8, 801)])
def test_thin_pictures_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "a.png")
    for read in (check_image, open_image):
        with pytest.raises(UserError, match="too thin"):
            read(tmp_path / "a.png")
    Image.new("L", (8, 800)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (8, 800)


def test_pipes_devices_and_huge_files_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.write(png_header(8, 8))
        file.truncate(1 << 40)
    for path in (tmp_path / "pipe.png", tmp_path / "sparse.png", Path("/dev/zero")):
        for read in (check_image, open_image):
            with pytest.raises(UserError, match=r"not a plain file|over the limit"):
                read(path)


@pytest.mark.parametrize("suffix", ["avif", "webp", "jpg", "png", "gif", "tif", "jp2", "ppm", "bmp"])
def test_a_flipped_bit_gives_a_picture_or_a_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((32, 32), 80).convert("RGB").save(path)
    sound, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(sound)
        data[random.integers(len(data) if random.random() < 0.5 else min(len(data), 300))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        with suppress(UserError), warnings.catch_warnings(action="ignore"):
            assert open_image(path).mode == "RGB"


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
