"""Running a command, with user errors as one line on stderr and an exit code; and tables for the terminal."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Container, Sequence

from lit_reduce.errors import UserError

Command = Callable[[Sequence[str]], None]

# Errors of the machine or of the user's paths; any other OSError is a bug and keeps its traceback.
_USERS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.EFBIG,
    errno.ENAMETOOLONG,
}


def run(command: Command, argv: Sequence[str] | None = None) -> int:
    """Run a command and turn user errors into one line on stderr and an exit code.

    Returns:
        0 on success, 2 for a mistake that the user can correct, 130 when interrupted.
    """
    warnings.formatwarning = _warning
    try:
        command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _USERS:
            raise
        if error.filename is None:  # writing to stdout: drop what it still holds, or the exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"{error.strerror}: {error.filename or 'the output'}")
    return 0


def columns(header: Sequence[str], lines: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """A table for a terminal, each column as wide as its longest cell; those whose index is in ``right`` end flush."""
    widths = [max(len(line[place]) for line in (header, *lines)) for place in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in pairs)

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "".join(f"{line.rstrip()}\n" for line in (row(header), rule, *map(row, lines)))


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
