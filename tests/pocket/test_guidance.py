"""Guidance: what the heads are shown, against the questions themselves."""

import pytest
import torch

from lit_reduce.pocket import guidance
from lit_reduce.pocket.guidance import guided_answers, misses
from lit_reduce.pocket.language import symbolic_batch
from lit_reduce.pocket.model import build_model
from lit_reduce.pocket.questions import questions
from lit_reduce.pocket.symbols import Symbols
from lit_reduce.pocket.world import make_scene


@pytest.mark.parametrize("start", [1.0, 4.0])
def test_what_is_left_on_the_start_token_says_how_many_are_counted(
    monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    goals: list[torch.Tensor] = []
    monkeypatch.setattr(guidance, "misses", lambda logp, goal: goals.append(goal.float()) or misses(logp, goal))
    model = build_model(0)
    symbols, batch = Symbols(model.get_input_embeddings()), symbolic_batch(2, scenes=4, seen=64, turns=14)
    visual = symbols(model.get_input_embeddings(), batch, batch["where"])
    losses = guided_answers(model, symbols, visual, batch["where"], batch["valid"], batch, start=start)
    assert losses["loss"].isfinite()
    shown = next(goal for goal in goals if goal.shape[-1] == 65)  # the start token and the patches
    counts, others = set(), 0
    for b in range(4):
        asked = questions(make_scene("train", 8 + b), 14)
        for t in (batch["targets"][b] >= 0).nonzero()[:, 0].tolist():
            question, share = asked[int(batch["turn"][b, t])], shown[b, t] / shown[b, t].sum().clamp(min=1)
            if question.prompt.startswith("how many"):
                n = len(question.about)
                assert float(share[0]) == pytest.approx(start / (start + n))
                counts.add(n)
            else:
                assert float(shown[b, t, 0]) in (0.0, 1.0)
                others += 1
    assert len(counts) > 2
    assert others > 20


def test_answers_to_how_many_weigh_as_much_as_is_said() -> None:
    model = build_model(0)
    symbols, batch = Symbols(model.get_input_embeddings()), symbolic_batch(3, scenes=4, seen=64, turns=14)
    visual = symbols(model.get_input_embeddings(), batch, batch["where"])

    def answer(targets: torch.Tensor, counted: float = 1.0) -> float:
        asked = {**batch, "targets": targets}
        losses = guided_answers(model, symbols, visual, batch["where"], batch["valid"], asked, counted=counted)
        return losses["answer"].item()

    targets, counts = batch["targets"], batch["tally"] >= 0
    alone, rest = answer(targets.masked_fill(~counts, -100)), answer(targets.masked_fill(counts, -100))
    many, few = int(((targets >= 0) & counts).sum()), int(((targets >= 0) & ~counts).sum())
    assert abs(alone - rest) > 0.1, "or the weight would not matter"
    for weight in (1.0, 3.0):
        expected = (weight * many * alone + few * rest) / (weight * many + few)
        assert answer(targets, weight) == pytest.approx(expected, rel=1e-4)
