"""What the frozen tower sees, computed once and kept on disk: float16, resumable, one row a picture."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_reduce.errors import UserError
from lit_reduce_smol.assemble import LAYERS, MEAN, SIDE, STD

EVERY = 64  # pictures between two flushes


class States:
    """Hidden states of a list of pictures, ``[pictures, tokens, channels]``, as far as they are computed.

    Attributes:
        done: ``[pictures]``, 1 where a row is computed.
    """

    def __init__(self, folder: Path, name: str, count: int, tokens: int, channels: int, write: bool = False) -> None:
        self.path = folder / f"{name}.f16"
        shape = (count, tokens, channels)
        mode: Any = "r+" if write else "r"
        marks = folder / f"{name}.done"
        if write and not marks.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _allocate(self.path, 2 * count * tokens * channels)
            _allocate(marks, count)
        if not marks.exists():
            raise UserError(f"{marks} is missing: run the stage 'states' first")
        if self.path.stat().st_size != 2 * count * tokens * channels:
            raise UserError(f"{self.path} holds other pictures; remove it and run the stage 'states' again")
        self.rows = np.memmap(self.path, np.float16, mode, shape=shape)
        self.done = np.memmap(marks, np.uint8, mode, shape=(count,))

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """The states ``[len(indices), tokens, channels]`` of pictures, float32."""
        return torch.from_numpy(self.rows[np.asarray(indices)].astype(np.float32))

    def fill(self, see: Callable[[Tensor], Tensor], open_picture: Callable[[int], Image.Image],
             order: Sequence[int], batch: int = 4) -> None:  # fmt: skip
        """Compute the rows of ``order`` that are not there yet, in that order."""
        todo = [i for i in order if not self.done[i]]
        for start in tqdm(range(0, len(todo), EVERY), desc=self.path.stem, mininterval=30, file=sys.stderr):
            part = todo[start : start + EVERY]
            for first in range(0, len(part), batch):
                some = part[first : first + batch]
                self.rows[some] = see(torch.stack([pixels(open_picture(i)) for i in some])).half().numpy()
            self.rows.flush()
            self.done[part] = 1
            self.done.flush()


def _allocate(path: Path, size: int) -> None:
    """Make a file of zeros whose blocks are taken: writing to a map on a full disk would kill the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({size >> 20} MiB): {error.strerror}; free some space") from error


def pixels(picture: Image.Image, side: int = SIDE) -> Tensor:
    """A picture as the tower takes it, ``[3, side, side]``; the same numbers as the processor's."""
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
def look(tower: Any, values: Tensor, layers: Sequence[int] = LAYERS) -> Tensor:
    """Hidden states ``[B, patches, channels * layers]`` of pictures ``[B, 3, H, W]``, without CLS."""
    hidden = tower(values, output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer][:, 1:] for layer in layers], -1)
