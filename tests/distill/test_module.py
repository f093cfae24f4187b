"""Training with the Trainer: what moves, what is saved, and that a killed run ends where an uninterrupted one does."""

import csv
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.profiling import peak_bytes
from lit_reduce.data.groups import Group
from lit_reduce.distill import logs
from lit_reduce.distill.callbacks import MovingAverage
from lit_reduce.distill.logs import LOGGERS, ContinuedCSV, run_id
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.trainer import fit
from lit_reduce.reducer import Reducer, create
from lit_reduce.tokens import Reduction, VisualTokens


class Pooling(Reducer):
    """A resampler without scores: learned weights mix the tokens of each run of neighbours."""

    name, kind, trained = "pooling", "resample", True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(36))
        self.register_buffer("calls", torch.tensor(3))

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        owner = torch.arange(tokens.count) * keep // tokens.count
        mix = torch.zeros(keep, tokens.count).index_put((owner, torch.arange(tokens.count)), self.weight.exp())
        features = (mix / mix.sum(1, keepdim=True)) @ tokens.features
        kept_indices = torch.tensor([int((owner == k).nonzero()[0]) for k in range(keep)])
        return Reduction(kept_indices.expand(len(features), -1), features=features)


def run(tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, chosen: Any, reducer: Reducer) -> Any:
    return fit(chosen, tiny.model, reducer, make.data(teacher, groups, chosen), Path(chosen.output))


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logged(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "log" / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }


def test_a_killed_run_resumes_exactly(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, dict[int, float]] = {"whole": {}, "killed": {}, "resumed": {}}
    real, state = Distiller.training_step, {"run": "whole", "die": -1}

    def watched(self: Distiller, batch: Any, index: int) -> Tensor:
        (part,) = batch
        if part.step == state["die"]:
            raise InterruptedError
        loss = real(self, batch, index)
        losses[state["run"]][part.step] = float(loss.detach())
        return loss

    monkeypatch.setattr(Distiller, "training_step", watched)
    before, whole = fingerprint(tiny.model), make.reducer()
    start = {name: x.clone() for name, x in whole.state_dict().items()}
    trainer, average = run(tiny, teacher, groups, make, make.settings(tmp_path / "a"), whole)
    assert trainer.global_step == 10

    state.update(run="killed", die=8)
    with pytest.raises(InterruptedError):
        run(tiny, teacher, groups, make, make.settings(tmp_path / "b"), make.reducer())
    state.update(run="resumed", die=-1)
    resumed = make.reducer()
    for weight in resumed.parameters():
        nn.init.zeros_(weight)  # everything must come from the checkpoint
    _, again = run(tiny, teacher, groups, make, make.settings(tmp_path / "b"), resumed)

    assert sorted(losses["whole"]) == list(range(10))
    assert sorted(losses["killed"]) == list(range(8))
    assert sorted(losses["resumed"]) == [6, 7, 8, 9]  # the last checkpoint was after six steps
    assert {**losses["killed"], **losses["resumed"]} == losses["whole"]
    assert logged(tmp_path / "b") == logged(tmp_path / "a")
    assert {step for step, name in logged(tmp_path / "b") if name == "train/loss"} == {4, 9}
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
        assert torch.equal(again.average[name], average.average[name]), name
    moved = [name for name, x in whole.state_dict().items() if not torch.equal(x, start[name])]
    assert set(moved) == set(start)

    # Invariant 5: the backbone's bytes never change, and nothing of it is in the checkpoint.
    assert fingerprint(tiny.model) == before
    assert all(weight.grad is None and not weight.requires_grad for weight in tiny.model.parameters())
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {f"reducer.{name}" for name in whole.state_dict()}


def test_a_finished_run_started_again_keeps_weights_and_average(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    chosen = make.settings(tmp_path, steps=3, guide_steps=1, val_every=3)
    reducer, again = make.reducer(), make.reducer()
    _, average = run(tiny, teacher, groups, make, chosen, reducer)
    _, same = run(tiny, teacher, groups, make, chosen, again)
    for name, weight in reducer.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert torch.equal(same.average[name], average.average[name])


def test_a_reducer_without_scores_learns_from_the_answers(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    reducer = Pooling()
    chosen = make.settings(tmp_path, val_every=10)
    run(tiny, teacher, groups, make, chosen, reducer)
    assert (reducer.weight != 0).all()
    data = make.data(teacher, groups, chosen)
    module = Distiller(tiny.model, reducer, chosen)
    assert set(module.losses(data.batches(0)[0])) == {"loss", "kl", "ce"}  # there is no stage 1
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_the_loss_of_each_stage_and_its_way_down(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    chosen = make.settings(tmp_path, budgets=[6, 6], steps=30)
    data, reducer = make.data(teacher, groups, chosen), make.reducer()
    module = Distiller(tiny.model, reducer, chosen)
    optimizer = torch.optim.Adam(reducer.parameters(), lr=1e-2)
    batch, seen = data.batches(0)[0], []
    for _ in range(12):
        losses = module.losses(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    assert seen[-1] < seen[0] - 0.1
    with torch.no_grad():
        for step in (0, 3, 4, 17, 29):
            losses = module.losses(data.batches(step)[0])
            assert float(losses["loss"]) == pytest.approx(weighted(losses, chosen, step), rel=1e-5)


def weighted(losses: dict[str, Tensor], chosen: Any, step: int) -> float:
    rank = float(losses["rank"] + chosen.loss.hinge * losses["hinge"])
    if step < 4:
        assert set(losses) == {"loss", "rank", "hinge"}
        return rank
    share = 2.0 + (0.2 - 2.0) * (step - 4) / 26
    return float(losses["kl"] + 0.5 * losses["ce"]) + share * rank


def test_validation_at_the_full_count_is_the_teacher(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    chosen = make.settings(tmp_path, steps=2, val_every=2, val_budgets=[36, 1], guide_steps=2)
    run(tiny, teacher, groups, make, chosen, make.reducer())
    found = {name: value for (_, name), value in logged(tmp_path).items() if name.startswith("val/")}
    assert found["val/agreement_36"] == 1
    assert found["val/kl_36"] < 1e-3 < found["val/kl_1"]
    assert (found["val/kept_36"], found["val/kept_1"]) == (36, 1)
    assert found["val/accuracy_36"] == 0  # the answers of the test are not what this backbone would say
    assert found["val/accuracy"] == (found["val/accuracy_36"] + found["val/accuracy_1"]) / 2


def test_one_wrong_token_makes_an_answer_wrong(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any
) -> None:
    chosen = make.settings(Path("unused"), val_budgets=[36])
    module, batch = Distiller(tiny.model, make.reducer(), chosen), make.data(teacher, groups, chosen).batches(0)[0]
    said, owner = said_by(tiny, batch), (batch.labels >= 0).nonzero()[:, 0]
    wrong = {0: [], 1: [0], 2: [-1], 3: []}  # which tokens of each row differ
    for row, places in wrong.items():
        reference = said[row].clone()
        reference[places] = (reference[places] + 1) % 90
        batch.top_ids[owner == row, 0] = reference
        batch.labels[row][batch.labels[row] >= 0] = reference
    module.validation_step([batch], 0)
    assert float(module.measures["agreement_36"].compute()) == 0.5
    assert float(module.measures["accuracy_36"].compute()) == 0.5


def said_by(tiny: Backbone, batch: Any) -> list[Tensor]:
    """The most likely word at each answer position of each row, from all tokens."""
    from lit_reduce.runtime.decoder.run import run_decoder

    with torch.no_grad():
        logits = run_decoder(tiny.model, {"input_ids": batch.ids, "attention_mask": batch.mask}, batch.features)
    best = logits.argmax(-1)[:, :-1]
    return [best[row][batch.labels[row, 1:] >= 0] for row in range(len(batch.ids))]


def test_batches_are_a_function_of_the_step_and_visit_every_picture(
    teacher: Teacher, groups: list[Group], make: Any
) -> None:
    chosen = make.settings(Path("unused"), pictures=1, turns=2)
    data = make.data(teacher, groups, chosen)
    assert torch.equal(data.batches(5)[0].ids, make.data(teacher, groups, chosen).batches(5)[0].ids)
    features = [teacher.outputs(group)["features"].float() for group in groups]
    for epoch in range(4):
        seen = {
            next(i for i in range(3) if torch.equal(data.batches(2 * epoch + k)[0].features[0], features[i]))
            for k in (0, 1)
        }
        assert seen == {0, 1}  # the third picture is for validation
    # Two processes of one picture share the batch of one process with two.
    double = make.data(teacher, groups, make.settings(Path("unused"), pictures=2, turns=2))
    for step in range(3):
        shares = torch.cat([data.batches(step, rank, 2)[0].guide for rank in (0, 1)])
        assert torch.equal(shares, double.batches(step)[0].guide)


def test_the_average_forgets_the_start_and_is_what_validation_sees() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reducer = nn.Linear(1, 1, bias=False)

    class Step:
        global_step = 0

    average, module, expected = MovingAverage(0.5), Holder(), None
    for step, value in enumerate((1.0, 3.0, 2.0, 8.0, 8.0), start=1):
        Step.global_step = step
        module.reducer.weight.data.fill_(value)
        average.on_train_batch_end(Step, module, None, None, 0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert float(average.average["weight"]) == pytest.approx(expected)
    average.on_validation_start(Step, module)
    assert float(module.reducer.weight.detach()) == pytest.approx(expected)
    average.on_validation_end(Step, module)
    assert float(module.reducer.weight.detach()) == 8
    other = MovingAverage(0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.average["weight"], average.average["weight"])


def test_a_continued_log_keeps_what_comes_before(tmp_path: Path) -> None:
    first = ContinuedCSV(tmp_path)
    for step in (4, 9, 14):
        first.log_metrics({"loss": step / 2} | ({"val": 1.0} if step == 9 else {}), step)
    second = ContinuedCSV(tmp_path)  # killed, and resumed from before step 9
    second.log_metrics({"loss": 7.0}, 9)
    second.log_metrics({"val": 2.0}, 9)
    assert logged(tmp_path) == {(4, "loss"): 2.0, (9, "loss"): 7.0, (9, "val"): 2.0}
    ContinuedCSV(tmp_path).log_metrics({"loss": 1.0}, 4)  # begun again from the start
    assert logged(tmp_path) == {(4, "loss"): 1.0}


def test_loggers_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_id(tmp_path, 0)
    assert run_id(tmp_path, 5) == first  # resumed
    assert run_id(tmp_path, 0) != first  # begun anew
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(logs, "_needs", lambda package: None)
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **words: made.append(words))
    LOGGERS["wandb"](tmp_path, 0)
    LOGGERS["wandb"](tmp_path, 5)
    assert made[0]["id"] == made[1]["id"]
    assert made[1]["resume"] == "allow"


def test_tensorboard_shows_a_resumed_step_once(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, value in ((0, 1.0), (3, 2.0)):  # the second process goes on from step 3
        logger = LOGGERS["tensorboard"](tmp_path, start)
        for step in range(start, start + 5):
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
        time.sleep(1.1)  # event files are told apart by their second
    seen = loading.EventAccumulator(str(tmp_path / "log"))
    seen.Reload()
    found = [(event.step, event.value) for event in seen.Scalars("loss")]
    assert found == [(step, 1.0 if step < 3 else 2.0) for step in range(8)]


@pytest.mark.parametrize("name", ["covipal", "packer"])
def test_checkpointing_changes_memory_and_nothing_else(tiny: Backbone, batch: Any, make: Any, name: str) -> None:
    found, peaks = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        options = {"hidden_size": 32, "width": 16, "heads": 2}
        reducer = create(name, **options)
        for weight in reducer.parameters():
            nn.init.normal_(weight, std=0.3)
        chosen = make.settings(Path("unused"), checkpointing=checkpointing, guide_steps=0, budgets=[20, 20])
        module = Distiller(tiny.model, reducer, chosen)

        def step(module: Distiller = module) -> None:
            losses = module.losses(batch)
            losses["loss"].backward()
            found.append((losses["loss"].detach(), [x.grad.clone() for x in module.reducer.parameters()]))

        peaks.append(peak_bytes(step, torch.device("cpu")))
    (plain, grads), (again, same) = found
    assert torch.equal(again, plain)
    for one, other in zip(grads, same, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
    assert peaks[1] < 0.8 * peaks[0]
    assert all("forward" not in vars(layer) for layer in tiny.model.get_decoder().layers)
