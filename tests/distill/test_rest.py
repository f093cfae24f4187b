"""Tokens that stand for what is dropped: in training as at inference, whatever the gate, and they learn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.distill.batch import Batch
from lit_reduce.distill.objectives import OBJECTIVES
from lit_reduce.distill.relaxation import GATES, exact, noisy, with_rest
from lit_reduce.distill.student import relaxed_logits, sees, student_logits
from lit_reduce.reducer import Reducer, create


@pytest.fixture
def resting() -> Reducer:
    torch.manual_seed(1)
    reducer = create("covipal", hidden_size=32, width=16, heads=2, layers=1, summary=2)
    reducer.rest.data.normal_(0, 1)
    return reducer


@pytest.mark.parametrize("candidates", [34, 20, 8])
def test_soft_equals_hard(tiny: Backbone, batch: Batch, resting: Reducer, candidates: int) -> None:
    with torch.no_grad():
        hard, *_ = student_logits(tiny.model, resting, batch, 10)
        tokens = sees(tiny.model, resting, batch)
        scores = resting.score(tokens)
        gated = with_rest(exact(scores, 8, 0.3, candidates), resting, tokens, scores, 10)
        soft, *_ = relaxed_logits(tiny.model, batch, gated)
        without, *_ = relaxed_logits(tiny.model, batch, exact(scores, 8, 0.3, candidates))
    assert gated.kept_indices.shape == (5, candidates + 2)
    torch.testing.assert_close(soft, hard, atol=1e-3, rtol=0)
    assert (without - hard).abs().max() > 0.05


def test_noise_does_not_reach_what_stands_for_the_rest(tiny: Backbone, batch: Batch, resting: Reducer) -> None:
    tokens = sees(tiny.model, resting, batch)
    scores = resting.score(tokens).detach()
    noise = torch.randn(5, 20, 32, generator=torch.Generator().manual_seed(0))
    drowned = noisy(batch.features, scores, 8, 0.3, 20, noise)
    gated = with_rest(drowned, resting, tokens, scores, 10)
    clean = with_rest(exact(scores, 8, 0.3, 20), resting, tokens, scores, 10)
    assert torch.equal(gated.kept_indices, clean.kept_indices)
    for row in range(5):
        places = scores[row].argsort()[:2].sort().values
        assert torch.equal(gated.features[row, places], clean.features[row, places])
        others = drowned.kept_indices[row]
        assert torch.equal(gated.features[row, others], drowned.features[row, others])


@pytest.mark.parametrize("gate", GATES)
def test_a_lesson_teaches_it_within_the_budget(
    tiny: Backbone, batch: Batch, resting: Reducer, make: Any, gate: str
) -> None:
    chosen = make.settings(Path("unused"), gate=gate, guide_steps=0, steps=60, candidates=1.5)
    lesson = OBJECTIVES["scores"](tiny.model, resting, batch, 10, chosen)
    logits, labels, _ = lesson.answers()
    assert lesson.gated.kept_indices.shape == (5, 12 + 2)
    assert all(row.unique().numel() == 14 for row in lesson.gated.kept_indices)
    loss = torch.nn.functional.cross_entropy(logits, labels) + sum(x for x in lesson.penalty().values())
    loss.backward()
    for name, weight in resting.named_parameters():
        assert weight.grad.abs().max() > 1e-7, name
    assert float(lesson.gated.gates.detach().sum(1).mean()) == pytest.approx(8, abs=2 if gate == "concrete" else 0.05)
