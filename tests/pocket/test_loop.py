"""The loop of the recipe: killed anywhere, it ends with the weights of a run that never was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_reduce_pocket.loop import fit, save, schedule

STEPS = 9


class Layered(nn.Module):
    """Has a matrix inside ``layers``, which Muon takes, and the rest, which AdamW takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner["layers"]:
            x = x + layer(x).tanh()
        return self.head(x)


def make(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 6, generator=generator), "y": torch.randint(0, 2, (8,), generator=generator)}


def go(folder: Path, model: nn.Module, die_at: int | None = None, **options) -> None:
    def loss_of(batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if step == die_at:
            raise InterruptedError
        return {"loss": nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])}

    folder.mkdir(exist_ok=True)
    fit("stage", {"net": model}, make, loss_of, steps=STEPS, lr=1e-2, folder=folder, device=torch.device("cpu"),
        warmup=3, every_seconds=0, workers=0, log_every=2, **options)  # fmt: skip


@pytest.mark.parametrize("die_at", [1, 6])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, die_at: int) -> None:
    whole, killed, resumed = Layered(), Layered(), Layered()
    go(tmp_path / "a", whole)
    with pytest.raises(InterruptedError):
        go(tmp_path / "b", killed, die_at)
    for weight in resumed.parameters():
        nn.init.zeros_(weight)  # everything must come from the checkpoint
    go(tmp_path / "b", resumed)
    fresh = Layered().state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
        assert not torch.equal(weight, fresh[name])
    assert {line.split()[0] for line in (tmp_path / "b" / "stage.log").read_text().splitlines()} >= {"8", "9"}


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    go(tmp_path, Layered())
    again = Layered()
    go(tmp_path, again, die_at=0)  # no step is made
    saved = torch.load(tmp_path / "stage.pt", weights_only=True)["parts"]["net"]
    assert all(torch.equal(x, saved[name]) for name, x in again.state_dict().items())


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    save(path, {"step": 1})
    before = path.read_bytes()

    def torn(state: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        save(path, {"step": 2})
    assert path.read_bytes() == before


def test_the_rate_warms_up_and_falls() -> None:
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.02)
