"""Comparing places: what is asked for is what a slow loop over scenes and questions finds."""

import pytest
import torch

from lit_reduce_pocket.comparing import APART, GAP, Distances, compared_spots, comparing
from lit_reduce_pocket.language import symbolic_batch, symbolic_loss
from lit_reduce_pocket.model import build_model
from lit_reduce_pocket.questions import gap_of, questions
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.world import SIZE, make_scene


def related(index: int) -> list:
    return [q for q in questions(make_scene("train", index), 14) if q.family == "relation"]


def test_a_gap_is_positive_where_the_answer_is_yes() -> None:
    asked = [q for i in range(40) for q in related(i)]
    assert {q.answer for q in asked} == {"yes", "no"}
    assert all((gap_of(q) > 0) == (q.answer == "yes") for q in asked)


def test_every_answer_about_two_things_gets_their_distance_and_the_gap_asked_for() -> None:
    batch = symbolic_batch(3, scenes=4, seen=64, turns=14)
    about, apart = compared_spots(batch)
    expected = []
    for b in range(4):
        asked = questions(make_scene("train", 12 + b), 14)
        for t in range(batch["ids"].shape[1]):
            turn = int(batch["turn"][b, t])
            if turn < 0 or batch["targets"][b, t] < 0 or asked[turn].family != "relation":
                continue
            first, second = asked[turn].about
            expected.append((b, t, first.x - second.x, first.y - second.y, gap_of(asked[turn])))
    assert [(b, t) for b, t, *_ in expected] == [tuple(x) for x in about.nonzero().tolist()]
    goals = torch.tensor([[dx, dy, gap] for _, _, dx, dy, gap in expected]) * 2 / SIZE
    torch.testing.assert_close(torch.cat([apart, batch["gap"][about][:, None]], 1), goals, atol=1e-5, rtol=1e-5)


def test_the_loss_is_of_states_behind_the_guided_layers_and_teaches_the_decoder() -> None:
    model = build_model(0)
    symbols, distances = Symbols(model.get_input_embeddings()), Distances(256)
    batch = symbolic_batch(5, scenes=2, seen=64, turns=14)
    states: dict[int, torch.Tensor] = {}
    for index in (APART, GAP):
        layer = model.get_decoder().layers[index]
        layer.register_forward_hook(lambda _, __, out, index=index: states.__setitem__(index, out))
    answers = symbolic_loss(model, symbols, torch.device("cpu"))
    losses = comparing(model, distances, answers)(batch, 0)
    about, apart = compared_spots(batch)
    wrong = gaps = 0.0
    for n, (b, t) in enumerate(about.nonzero().tolist()):
        at = t - about.shape[1]  # text stands at the end
        far, gap = (states[i][b, at] / (states[i][b, at].square().mean() + 1e-6).sqrt() for i in (APART, GAP))
        wrong += float((distances.apart(far) - apart[n]).square().sum().detach()) / len(apart)
        gaps += float((distances.gap(gap)[0] - batch["gap"][b, t]).square().detach()) / len(apart)
    assert float(losses["apart"].detach()) == pytest.approx(wrong, rel=1e-3)
    assert float(losses["gap"].detach()) == pytest.approx(gaps, rel=1e-3)
    alone = float(answers(batch, 0)["loss"].detach())
    assert float(losses["loss"].detach()) == pytest.approx(alone + wrong + gaps, rel=1e-3)
    model.zero_grad()
    (losses["apart"] + losses["gap"]).backward()
    assert model.get_decoder().layers[GAP].mlp.down_proj.weight.grad.abs().sum() > 0
    after = model.get_decoder().layers[GAP + 1].mlp.down_proj.weight.grad
    assert after is None or not after.any()  # nothing behind the read-outs is asked
