"""The projector's own lesson: whitened features, and a whitening that folds away."""

import numpy as np
import pytest
import torch

from lit_reduce_pocket import translate
from lit_reduce_pocket.model import build_model
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.translate import Features, features_of, fold, token_batch, translation_loss, wear
from lit_reduce_pocket.world import make_scene


def uneven(count: int, width: int) -> torch.Tensor:
    """Features whose directions differ a hundredfold in scale, as numpy draws them."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    return torch.from_numpy((rng.normal(size=(count, width)) * np.logspace(-1, 1, width) + 3) @ turn).float()


def test_folding_changes_no_token() -> None:
    model = build_model(0)
    plain = model.model.multi_modal_projector
    worn, x = wear(model), uneven(4000, 192)
    before = plain(x)
    assert torch.allclose(worn(x), before, atol=1e-4)  # it does nothing until it is started
    worn.start(x)
    white = (x - worn.mean) @ worn.whiten
    assert torch.allclose(torch.from_numpy(np.cov(white.double().numpy().T)), torch.eye(192).double(), atol=0.12)
    said = worn(x)
    assert not torch.allclose(said, before, atol=0.1)
    fold(model)
    assert model.model.multi_modal_projector is plain
    assert (plain(x) - said).abs().max() < 2e-3 * said.abs().max()


def test_goals_are_words_and_groups_weigh_the_same() -> None:
    model = build_model(0)
    symbols = Symbols(model.get_input_embeddings())
    seen, goals, weights = features_of(model, symbols, torch.device("cpu"), pictures=2, scenes=2)
    assert seen.shape == (2 * 576, 192)
    assert goals.shape == (2 * 576, 256)
    values, counts = weights.unique(return_counts=True)
    assert len(values) == 3
    assert torch.allclose(values * counts / len(weights), torch.full((3,), 1 / 3))
    scene = make_scene("train", 1)  # the words for one shape's centre, added up by hand
    thing = next(t for t in scene.shapes if t.number is None)
    at = 576 + int(thing.y // 14) * 24 + int(thing.x // 14)
    lookup, place = model.get_input_embeddings().weight, symbols.place.weight
    from lit_reduce_pocket.words import vocabulary

    words = [vocabulary().index(w) for w in (thing.color, thing.shape, "large" if thing.large else "small")]
    row, column = divmod(at - 576, 24)
    expected = lookup[words].sum(0) + place[row] + place[24 + column] + symbols.extra.weight[2]
    assert torch.allclose(goals[at], expected, atol=1e-5)


def test_the_projector_learns_small_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be said lies in the smallest directions; a few steps suffice behind the whitening."""
    model = build_model(0)
    symbols = Symbols(model.get_input_embeddings())
    x = uneven(8 * 576, 192)
    rank = torch.linalg.eigh(torch.cov(x.T))[1]
    small = torch.nn.functional.normalize((x - x.mean(0)) @ rank[:, :8], dim=0) * len(x) ** 0.5
    made: Features = x, torch.cat([small, torch.zeros(len(x), 248)], 1), torch.ones(len(x))
    monkeypatch.setattr(translate, "features_of", lambda *_: made)
    worn = wear(model)
    loss_of = translation_loss(model, symbols, torch.device("cpu"), 8)
    first = None
    for step in range(60):
        loss = loss_of(token_batch(step, 8), step)["loss"]
        if first is None:
            first, optimizer = float(loss.detach()), torch.optim.AdamW(worn.projector.parameters(), lr=1e-2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.3 * first
    assert torch.equal(token_batch(3, 8), token_batch(3, 8))
    assert not torch.equal(token_batch(3, 8), token_batch(4, 8))
