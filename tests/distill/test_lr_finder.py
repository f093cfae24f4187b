"""The learning-rate finder: known curves, a copy that leaves the run as it is, and the command."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.lr_finder import LearningRateFinder, show, steepest, sweep
from lit_reduce.distill.teacher import Teacher


def test_the_steepest_place_of_a_known_curve() -> None:
    rates = [10 ** (-5 + i / 10) for i in range(50)]
    fall = [-math.tanh(3 * (math.log10(rate) + 3)) for rate in rates]  # falls fastest at 1e-3
    assert steepest(rates, fall) == pytest.approx(1e-3)
    assert steepest(rates, [-loss for loss in fall]) is None
    assert steepest(rates[:4], fall[:4]) is None
    risen = [*fall[:35], *[9.0] * 5, *[2.0] * 10]  # a leap back down from too high a rate is no advice
    assert steepest(rates, risen) == pytest.approx(1e-3)
    # Unevenly spaced rates: the slope counts per factor, not per step.
    assert steepest([1e-5, 1e-4, 1e-3, 2e-3, 1e-1], [4.0, 3.0, 2.0, 1.4, 1.3], first=1) == pytest.approx(1e-3)


def test_it_trains_a_copy_at_rising_rates(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    chosen = make.settings(tmp_path, steps=100, guide_steps=4)
    reducer, data = make.reducer(), make.data(teacher, groups, chosen)
    start, state = {name: x.clone() for name, x in reducer.state_dict().items()}, torch.get_rng_state()
    found = sweep(chosen, tiny.model, reducer, data)
    assert all(torch.equal(x, start[name]) for name, x in reducer.state_dict().items())
    assert all(weight.grad is None for weight in [*reducer.parameters(), *tiny.model.parameters()])
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
    factors = [b / a for a, b in zip(found.rates[:-1], found.rates[1:], strict=True)]
    assert found.rates[0] == pytest.approx(1e-5)
    assert factors == pytest.approx([10 ** (5 / 59)] * len(factors))
    assert min(found.smooth) < found.smooth[5] - 0.1, "it learns on the way"
    assert len(found.rates) == 60 or found.losses[-1] > min(found.smooth)
    assert found.best is not None
    said = show(found, tmp_path / "sweep.png")
    assert f"learning_rate={found.best:.1e}" in said
    assert said.count("\n") == 2 + len(found.rates[::4]) + 1
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (1024, 640)
    assert "never falls" in show(LearningRateFinder([1.0], [2.0], [2.0], None), tmp_path / "flat.png")


def test_it_ends_when_the_loss_explodes(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_reduce.distill.module import Distiller

    seen = iter([1.0] * 10 + [1e3] * 50)
    reducer = make.reducer()

    def losses(self: Distiller, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": next(seen) + 0 * sum(x.sum() for x in self.reducer.parameters())}

    monkeypatch.setattr(Distiller, "losses", losses)
    chosen = make.settings(Path("unused"))
    found = sweep(chosen, tiny.model, reducer, make.data(teacher, groups, chosen))
    assert found.losses == [1.0] * 10
