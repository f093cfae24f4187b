import hashlib
import sys
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from lit_reduce.errors import UserError
from lit_reduce_smol import parts

CONTENT = b"weights"


def write(source, out):
    assert source.read_bytes() == CONTENT
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(CONTENT)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part in an installed package that cannot be imported."""
    package = tmp_path / "site" / "fake_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its own dependencies are missing')\n")
    (package / "w.bin").write_bytes(CONTENT)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("LIT_REDUCE_CACHE", str(tmp_path / "cache"))
    return parts.Part("fake", "fake_weights", "w.bin", hashlib.sha256(CONTENT).hexdigest(), 1000, (), write)


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


def test_converts_once_and_needs_the_package_no_more(part, tmp_path):
    folder = parts.folder_of(part)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert parts.folder_of(replace(part, module="gone", convert=None)) == folder


def test_missing_package_says_what_to_install(part, tmp_path):
    with pytest.raises(UserError, match=r"package no-such-module: pip install"):
        parts.folder_of(replace(part, module="no_such_module"))
    assert cached(tmp_path) == []


def test_missing_converter(part, tmp_path):
    with pytest.raises(UserError, match="needs no_such_converter: pip install"):
        parts.folder_of(replace(part, needs=("no_such_converter",)))
    assert cached(tmp_path) == []


def test_wrong_hash(part, tmp_path):
    with pytest.raises(UserError, match="not the file that smol was trained with"):
        parts.folder_of(replace(part, sha256="0" * 64))
    assert cached(tmp_path) == []


def test_killed_conversion_is_swept_and_done_again(part, tmp_path):
    stale = parts.cache_dir() / f".fake-{part.sha256[:8]}.12ab34cd"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    folder = parts.folder_of(part)
    assert not stale.exists()
    assert (folder / "model.safetensors").is_file()


def test_failed_conversion_leaves_nothing(part, tmp_path):
    def fails(source, out):
        write(source, out)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        parts.folder_of(replace(part, convert=fails))
    assert cached(tmp_path) == ["smol"]


def test_no_space(part, tmp_path):
    with pytest.raises(UserError, match=r"MiB are needed and \d+ free"):
        parts.folder_of(replace(part, size=1 << 60))
    assert cached(tmp_path) == []


def test_space_that_runs_out(part, tmp_path):
    def fails(source, out):
        write(source, out)
        raise SafetensorError("No space left on device (os error 28)")

    with pytest.raises(UserError, match="No space left"):
        parts.folder_of(replace(part, convert=fails))
    assert cached(tmp_path) == ["smol"]


def test_cache_that_cannot_be_written(part, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot write"):
        parts.folder_of(part)
