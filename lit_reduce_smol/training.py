"""The trained parts with their optimizer: steps at a constant rate from which a short decay branches off."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.files import atomic_folder, atomic_path
from lit_reduce_smol.assemble import TRAINED, read_trained
from lit_reduce_smol.packed import Batch
from lit_reduce_smol.projector import Projector
from lit_reduce_smol.reader import Reader

WARMUP = 50  # steps
PROJECTOR = "projector."


@dataclass
class Lesson:
    """One step's data.

    Attributes:
        states: ``[B, tokens, channels]``.
        batch: The turns.
        side: Tokens a row and column that the states were averaged to.
    """

    states: Tensor
    batch: Batch
    side: int


class Training:
    """Projector and updates, and how far they have come.

    Attributes:
        seen: Pictures so far.
        origin: ``seen`` of the state that this one branched off from.
    """

    def __init__(self, reader: Reader, projector: Projector, rates: tuple[float, float]) -> None:
        self.reader, self.projector = reader, projector
        self.rates, self.seen, self.steps, self.origin = rates, 0, 0, 0
        groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(self.parts, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Projector and reader."""
        return self.projector, self.reader

    def loss(self, lesson: Lesson) -> Tensor:
        """Mean over the targets."""
        mean: Tensor = self.reader(self.projector(lesson.states), lesson.batch).mean()
        return mean

    def step(self, lesson: Lesson, factor: float = 1.0) -> float:
        """One step of the optimizer at ``factor`` times the rates; returns the loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor * min(1.0, (self.steps + 1) / WARMUP)
        self.optimizer.zero_grad()
        loss = self.loss(lesson)
        loss.backward()
        nn.utils.clip_grad_norm_([p for part in self.parts for p in part.parameters()], 1.0)
        self.optimizer.step()
        self.seen += len(lesson.states)
        self.steps += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on, whole or not at all."""
        state = {
            "projector": self.projector.state_dict(), "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(), "seen": self.seen, "steps": self.steps, "origin": self.origin,
        }  # fmt: skip
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how a full disk shows in its writer
                raise UserError(f"cannot write {path}; free some space, the last checkpoint stays") from error

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            UserError: It cannot be read, or is of another shape.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.projector.load_state_dict(state["projector"])
            self.reader.load_state_dict(state["reader"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, LookupError, ValueError, EOFError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"cannot go on from {path} ({reason}); remove it to start this stage anew") from error
        self.seen, self.steps, self.origin = state["seen"], state["steps"], state["origin"]

    def run(self, until: int, make: Callable[[int], Lesson], path: Path, *, seconds: float,
            factor: Callable[[int], float] = lambda _: 1.0, watch: Callable[[int], dict[str, float]] | None = None,
            every: int = 400) -> None:  # fmt: skip
        """Step until so many pictures were seen; saves every ``seconds`` and at the end.

        Args:
            until: Pictures.
            make: Number of pictures seen -> the next step's data.
            path: The file to save to.
            seconds: Between two saves.
            factor: Pictures seen -> factor of the rates.
            watch: Side -> figures for the log, every ``every`` pictures.
            every: Pictures.
        """
        saved = last = time.monotonic()
        mean, since, before = 0.0, 0, self.seen
        while self.seen < until:
            lesson = make(self.seen)
            loss = self.step(lesson, factor(self.seen))
            mean, since = mean + loss, since + 1
            now = time.monotonic()
            if since == 10 or self.seen >= until:
                more: dict[str, Any] = {}
                if watch is not None and (self.seen // every > before // every or self.seen >= until):
                    more = watch(lesson.side)
                pace = (now - last) / max(1, self.seen - before)
                line = " ".join(f"{name} {value:.3f}" for name, value in more.items())
                print(f"{time.strftime('%H:%M:%S')} seen {self.seen} side {lesson.side} loss {mean / since:.3f} "
                      f"{pace:.2f} s/picture {line}".rstrip(), flush=True)  # fmt: skip
                mean, since, before, last = 0.0, 0, self.seen, time.monotonic()
            if now - saved > seconds:
                self.save(path)
                saved = time.monotonic()
        self.save(path)


def save_trained(folder: Path, training: Training, settings: dict[str, Any]) -> None:
    """Write what is shipped: ``trained.safetensors`` (float16; standardisation in float32) and ``trained.json``."""
    tensors = {f"{PROJECTOR}{k}": x.half() for k, x in training.projector.state_dict().items()}
    tensors |= {f"{PROJECTOR}{k}": getattr(training.projector, k).clone() for k in ("mean", "std")}
    tensors |= {k: x.half().contiguous() for k, x in training.reader.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / TRAINED)
        record = {"pictures": training.seen, "settings": settings}
        (temporary / "trained.json").write_text(json.dumps(record, indent=2) + "\n")


def load_trained(folder: Path, training: Training) -> None:
    """Start from what `save_trained` wrote; the optimizer starts anew.

    Raises:
        UserError: A file is missing, torn, or of another shape.
    """
    tensors = {k: x.float() for k, x in read_trained(folder).items()}
    projector = {k.removeprefix(PROJECTOR): x for k, x in tensors.items() if k.startswith(PROJECTOR)}
    try:
        training.projector.load_state_dict(projector)
        training.reader.load_state_dict({k: x for k, x in tensors.items() if not k.startswith(PROJECTOR)})
        training.seen = int(json.loads((folder / "trained.json").read_text())["pictures"])
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"cannot start from {folder} ({reason}); name an export of this recipe") from error
