"""Whole files or none: what is on disk after success, after a failure in the middle, and when the disk says no."""

import errno
import os
from pathlib import Path

import pytest

from lit_reduce.errors import UserError
from lit_reduce.files import atomic_folder, atomic_path, write_atomic

FULL = Path("/dev/full")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "one")
    write_atomic(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["b.txt"]


def test_a_failure_in_the_middle_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".png"
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.png"]


def test_new_files_follow_the_umask_like_any_other(tmp_path):
    write_atomic(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("target", ["file/inside.txt", "folder"])
def test_impossible_places_are_user_errors(tmp_path, target):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{target}"):
        write_atomic(tmp_path / target, "x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_names_path_and_reason(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")

    def fill():
        with atomic_path(path), FULL.open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(UserError, match=rf"cannot write {path}: No space left on device"):
        fill()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def test_the_callers_own_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "elsewhere" / "missing").read_text()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "b"):
        _ = 1 / 0
    assert names(tmp_path) == []


def test_folder_appears_whole_with_subfolders(tmp_path):
    with atomic_folder(tmp_path / "new" / "plug") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "x").write_text("1")
        assert not (tmp_path / "new" / "plug").exists()
    assert (tmp_path / "new" / "plug" / "deep" / "x").read_text() == "1"
    assert names(tmp_path / "new") == ["plug"]


def test_folder_that_exists_keeps_what_is_not_ours(tmp_path):
    target = tmp_path / "plug"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "mine").write_text("mine")
    (target / "x").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "y").write_text("new")
        (temporary / "x").write_text("new")
    assert (target / "x").read_text() == (target / "deep" / "y").read_text() == "new"
    assert (target / "deep" / "mine").read_text() == "mine"
    assert names(tmp_path) == ["plug"]


def test_folder_failure_changes_nothing(tmp_path):
    target = tmp_path / "plug"
    target.mkdir()
    (target / "x").write_text("old")

    def fail():
        with atomic_folder(target) as temporary:
            (temporary / "x").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        fail()
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["plug"]


def test_folder_on_a_file_is_a_user_error(tmp_path):
    (tmp_path / "plug").write_text("x")
    with pytest.raises(UserError, match="a file of that name is in the way"), atomic_folder(tmp_path / "plug"):
        pass
    assert (tmp_path / "plug").read_text() == "x"
