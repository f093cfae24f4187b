"""Training that is told to stop says so in its exit code, and goes on where it was."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lit_reduce import console
from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.trainer import fit


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_training_and_it_goes_on(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], number: int, code: int, said: str,
) -> None:  # fmt: skip
    chosen = make.settings(tmp_path / "out", steps=4, guide_steps=0, save_every=1, val_every=4)
    seen: list[int] = []
    real = Distiller.training_step

    def step(self: Distiller, batch: Any, index: int) -> Any:
        (part,) = batch
        seen.append(part.step)
        if part.step == 2:
            os.kill(os.getpid(), number)
        return real(self, batch, index)

    def train(_: object) -> None:
        fit(chosen, tiny.model, make.reducer(), make.data(teacher, groups, chosen), tmp_path / "out")

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(Distiller, "training_step", step)
    assert console.run(train, []) == code
    assert capfd.readouterr().err.splitlines()[-1] == said
    assert seen == [0, 1, 2]
    assert {each: signal.getsignal(each) for each in before} == before
    monkeypatch.setattr(Distiller, "training_step", real)
    assert console.run(train, []) == 0
