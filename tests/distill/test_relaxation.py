"""Gates of training: what enters, what it is worth, and that chance is the same in every run and process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.relaxation import GATES, exact, noisy, random
from lit_reduce.distill.seeded_sampling import normal, uniform
from lit_reduce.distill.student import relaxed_logits, sees, student_logits
from lit_reduce.distill.teacher import Teacher
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.run import run_decoder


def given(rows: int = 5, count: int = 36) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(0))


def test_chance_keeps_as_many_as_wanted_on_average_and_the_sure_ones_always() -> None:
    scores = given(1).expand(2000, -1)
    gated = random(scores, 9, 0.3, 36, 0.5, uniform(0, 0, torch.arange(2000), 36))
    opened = (gated.gates > 0.5).double()
    expected = exact(scores[:1], 9, 0.3, 36).gates[0].double()
    spread = (expected * (1 - expected) / 2000).sqrt()
    assert ((opened.mean(0) - expected).abs() <= 5 * spread + 1e-3).all()
    counts = opened.sum(1)
    assert float(counts.mean()) == pytest.approx(9, abs=0.2)
    assert float(counts.var()) == pytest.approx(float((expected * (1 - expected)).sum()), rel=0.15)


def test_hard_random_gates_hide_what_is_shut(tiny: Backbone, batch: Batch) -> None:
    """At the end of the way the stream is that of the open tokens, hidden by a mask in the whole prompt."""
    gated = random(given(), 9, 0.3, 36, 1e-3, uniform(0, 0, batch.numbers, 36))
    opened = gated.gates > 0.5
    mask = batch.mask.clone()
    for row, keep in enumerate(opened):
        mask[row, batch.ids[row] == tiny.model.config.image_token_id] = keep.long()
    with torch.no_grad():
        soft, *_ = relaxed_logits(tiny.model, batch, gated)
        positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": positions}
        whole = run_decoder(tiny.model, inputs, batch.features)[:, :-1][batch.labels[:, 1:] >= 0]
    torch.testing.assert_close(soft, whole, atol=1e-3, rtol=0)


def test_random_gates_of_few_candidates_are_the_open_ones() -> None:
    chance = uniform(0, 0, torch.arange(5), 36)
    gated = random(given(), 9, 0.3, 18, 0.1, chance)
    for kept_indices, gates in zip(gated.kept_indices, gated.gates, strict=True):
        assert set((gates > 0.5).nonzero()[:, 0].tolist()) <= set(kept_indices.tolist())
    assert torch.equal(gated.kept_indices, gated.kept_indices.sort(-1).values)
    assert gated.bias is not None
    torch.testing.assert_close(gated.bias, gated.gates.gather(1, gated.kept_indices).clamp_min(1e-6).log())


def test_noise_spares_what_is_kept_and_drowns_the_rest(tiny: Backbone, batch: Batch, covipal: Reducer) -> None:
    scores = covipal.score(sees(tiny.model, covipal, batch)).detach()
    noise = normal(0, 0, batch.numbers, 36, 32)
    gated = noisy(batch.features, scores, 9, 1e-5, 36, noise)
    kept = torch.zeros(5, 36, dtype=torch.bool).scatter(1, scores.topk(9).indices, True)
    made = gated.features
    torch.testing.assert_close(made[kept], batch.features[kept], rtol=0.02, atol=0.05 * float(batch.features.std()))
    rest = torch.nn.functional.cosine_similarity(made[~kept], batch.features[~kept], dim=-1)
    assert rest.abs().mean() < 0.3
    size = made.square().mean(1).sqrt() / batch.features.square().mean(1).sqrt()
    assert 0.8 < float(size.mean()) < 1.2, "noise as large as the tokens"
    with torch.no_grad():  # where only the kept ones enter, it is the stream of inference but for a trace of noise
        soft, *_ = relaxed_logits(tiny.model, batch, noisy(batch.features, scores, 9, 1e-5, 9, noise[:, :9]))
        hard, *_ = student_logits(tiny.model, covipal, batch, 9)
        all_of_them, *_ = relaxed_logits(tiny.model, batch, gated)
    assert (soft - hard).abs().mean() < 0.1 * (all_of_them - hard).abs().mean()


@pytest.mark.parametrize("gate", GATES)
def test_scores_learn_through_every_gate(tiny: Backbone, batch: Batch, make: Any, gate: str) -> None:
    """Trained directly, scores fall in the loss of the stream that inference reads."""
    chosen = make.settings(Path("unused"), gate=gate, guide_steps=0, steps=60, tau=0.3)
    scores = given().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)

    def hard() -> float:
        with torch.no_grad():
            logits, labels, _ = relaxed_logits(tiny.model, batch, exact(scores, 6, 0.3, 6))
            return float(torch.nn.functional.cross_entropy(logits, labels))

    first = hard()
    for step in range(25):
        batch.step = step
        logits, labels, _ = relaxed_logits(tiny.model, batch, GATES[gate](batch, scores, 6, 36, chosen))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert hard() < first - 0.1
    assert all(weight.grad is None for weight in tiny.model.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_chance_is_the_same_in_every_run_and_process(
    tiny: Backbone, teacher: Teacher, groups: list[Group], make: Any, gate: str
) -> None:
    chosen = make.settings(Path("unused"), gate=gate, pictures=2, curriculum=0.5)
    one = make.settings(Path("unused"), gate=gate, pictures=1, curriculum=0.5)

    def losses(rank: int, world: int) -> dict[str, float]:
        data = make.data(teacher, groups, chosen if world == 1 else one)
        module = Distiller(tiny.model, make.reducer(), chosen)
        with torch.no_grad():
            return {name: float(x) for name, x in module.losses(data.batches(7, rank, world)[0]).items()}

    whole = losses(0, 1)
    assert losses(0, 1) == whole
    assert ("budget" in whole) == (gate == "concrete")
    halves = [losses(rank, 2) for rank in (0, 1)]
    for name, value in whole.items():
        assert (halves[0][name] + halves[1][name]) / 2 == pytest.approx(value, rel=1e-4), name
