"""Reading plain files of a bounded size, and writing without half-written ones.

Everything that is written goes to a temporary name beside the target, then is renamed.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lit_reduce.errors import UserError

PathLike = str | os.PathLike[str]


def check_plain(path: PathLike, max_bytes: int) -> None:
    """Refuse what cannot be read to its end: pipes and devices, which may block or never end, and huge files.

    Raises:
        UserError: ``path`` is not a plain file, or has more than ``max_bytes`` bytes.
        OSError: it is not there or cannot be asked.
    """
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise UserError(f"{path} is {kind}, not a plain file; give a file")
    if found.st_size > max_bytes:
        raise UserError(f"{path} has {found.st_size:,} bytes, over the limit of {max_bytes:,}; is it the right file?")


def read_plain(path: PathLike, max_bytes: int) -> bytes:
    """Read a whole file after `check_plain`.

    Raises:
        UserError: as `check_plain`.
        OSError: as `check_plain`, or it cannot be read.
    """
    check_plain(path, max_bytes)
    return Path(path).read_bytes()


def write_atomic(path: PathLike, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) so that ``path`` holds either its old content or all of the new one.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; it takes the place of ``path`` on success, vanishes on failure.

    The temporary name keeps the suffix, because picture and plot writers choose their format by it.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder; give the name of a file")
    temporary = _beside(target)
    with _explained(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: PathLike) -> None:
    """Find out before long work whether a file can be written there later; makes the folder, leaves no file.

    Raises:
        UserError: the folder cannot be written, or ``path`` is there and is not a plain file.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {target}: it is not a plain file; give another name")
    temporary = _beside(target)
    with _explained(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success its content becomes ``path``.

    A new folder appears at once. In a folder that is already there each file replaces its namesake, one whole file
    after the other in the order of names, and whatever else lies there is left alone: it may be the user's.

    Raises:
        UserError: the folder cannot be written, the disk is full, or ``path`` is a file.
    """
    target = Path(path).resolve()
    temporary = _beside(target)
    with _explained(target, temporary):
        if target.exists() and not target.is_dir():
            raise UserError(f"cannot write the folder {target}: a file of that name is in the way; give another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            entries = sorted(temporary.rglob("*"))
            for entry in entries:
                _flush(entry)
            if not target.exists():
                temporary.rename(target)
                return
            for entry in entries:
                place = target / entry.relative_to(temporary)
                if entry.is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    entry.replace(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: PathLike) -> Iterator[FileIO]:
    """Open a file for reading and appending that no other process opens like this until the block ends.

    The file is made where there is none, and removed again when it is still empty at the end.

    Raises:
        UserError: Another process holds it, or it cannot be opened.
    """
    target = Path(path)
    fresh = not target.exists()
    try:
        file = target.open("ab+", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from error
    with file:
        _lock(file, target)
        try:
            yield file
        finally:
            if fresh and is_at(file, target) and not file.seek(0, os.SEEK_END):
                target.unlink()


def is_at(file: FileIO, path: PathLike) -> bool:
    """Whether the open file is still the one of that name: not removed, not replaced by another."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(path).stat())
    except OSError:
        return False


def _lock(file: FileIO, path: Path) -> None:
    busy = UserError(f"{path} is being written by another run: wait for it, or give another output")
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:  # some network file systems have no locks
        return
    if not is_at(file, path):  # the run that held it has just removed it
        raise busy


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")


def _flush(path: Path) -> None:
    """Force the bytes to the disk, so that the rename never overtakes them; also where a full disk is noticed late."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _explained(target: Path, temporary: Path) -> Iterator[None]:
    """Turn an error of the file system about this target into a sentence; other errors of the caller pass through."""
    try:
        yield
    except OSError as error:
        where = temporary if error.filename is None else Path(str(error.filename))
        ours = where in target.parents or where.is_relative_to(temporary) or where.is_relative_to(target)
        if error.errno is None or not ours:
            raise
        raise UserError(f"cannot write {target}: {error.strerror}; free some space or choose another place") from error
