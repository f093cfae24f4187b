"""Files of checkpoints: written whole beside the target and renamed, with a checksum that is compared on reading."""

import hashlib
import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic

PREFIX = b"sha256:"
SIZE = len(PREFIX) + 64


class CheckedIO(TorchCheckpointIO):
    """Writes checkpoints as ``torch.save`` does, with the SHA-256 of all bytes as the comment of the zip archive.

    The base class writes to the folder for temporary files, and moves the file from there: on another file system that
    is a copy, which a full disk tears.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the file of before stays until the new one is whole.

        Raises:
            UserError: The folder cannot be written, or the disk is full.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        body = buffer.getvalue()[:-2] + SIZE.to_bytes(2, "little")  # an archive ends with the length of its comment
        write_atomic(path, body + PREFIX + hashlib.sha256(body).hexdigest().encode())


def read_checkpoint(path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a checkpoint, on the CPU, and whether it carries a checksum.

    Raises:
        UserError: It is damaged.
    """
    try:
        data = path.read_bytes()
        checked = data[-SIZE:].startswith(PREFIX)
        if checked and data[-64:] != hashlib.sha256(data[:-SIZE]).hexdigest().encode():
            raise EOFError
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(checkpoint["state_dict"], dict):
            raise TypeError
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, UnpicklingError) as error:
        raise UserError(f"{path} is damaged and cannot be resumed from: remove it, or give another output") from error
    return checkpoint, checked
