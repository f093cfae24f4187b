"""Tests of the tests: break the runtime on purpose; the comparison with the masked model must notice."""

from dataclasses import replace

import pytest
import torch

from lit_reduce.reducer import create
from lit_reduce.runtime import attach, compact, positions, projector, session
from lit_reduce.runtime import conversation as turns

left_padded, reduce_images, shorten = compact.left_padded, compact.reduce_images, compact.shorten
KEEP, NOTICED = 10, 1e-2


def renumber(monkeypatch):
    monkeypatch.setattr(session, "shorten", lambda *args: shorten(*args[:4], positions="renumber"))


def shift_positions(monkeypatch):
    right = positions.prompt_positions
    monkeypatch.setattr(positions, "prompt_positions", lambda mask: right(mask) + (mask.cumsum(1) > 4))


def show_padding(monkeypatch):
    def wrong(*args):
        short, prompt_map = shorten(*args)
        return short | {"attention_mask": torch.ones_like(short["attention_mask"])}, prompt_map

    monkeypatch.setattr(session, "shorten", wrong)


def pad_on_the_right(monkeypatch):
    def wrong(selected):
        order = torch.argsort((~selected).int(), dim=1, stable=True)[:, : int(selected.sum(1).max())]
        return order, selected.gather(1, order), True

    monkeypatch.setattr(compact, "left_padded", wrong)


def reverse_kept_order(monkeypatch):
    def wrong(*args):
        images = reduce_images(*args)
        return replace(images, features=[x.flip(0) for x in images.features])

    monkeypatch.setattr(projector, "reduce_images", wrong)


def swap_images(monkeypatch):
    def wrong(*args):
        images = reduce_images(*args)
        features = images.features
        same = [x for x in features if len(x) == len(features[0])]
        return replace(images, features=[*same[1:], same[0], *features[len(same) :]])

    monkeypatch.setattr(projector, "reduce_images", wrong)


def drop_a_text_token(monkeypatch):
    def wrong(selected):
        selected = selected.clone()
        selected[:, -2] = False
        return left_padded(selected)

    monkeypatch.setattr(compact, "left_padded", wrong)


def keep_the_next_token(monkeypatch):
    def wrong(*args):
        images = reduce_images(*args)
        return replace(images, kept_indices=[(index + 1).remainder(36).sort().values for index in images.kept_indices])

    monkeypatch.setattr(projector, "reduce_images", wrong)


def error(tiny, batch, reference, helpers) -> float:
    """The worst difference to the masked model over a select method with equal counts, and one with unequal ones."""
    worst = 0.0
    for reducer in (create("random"), helpers.uneven):
        with torch.no_grad():
            expected = tiny.model.generate(**reference(batch, reducer, KEEP), **helpers.greedy)
            with attach(tiny.model, reducer, keep=KEEP):
                worst = max(worst, helpers.gap(tiny.model.generate(**batch, **helpers.greedy), expected))
    return worst


MUTATIONS = [
    renumber, shift_positions, show_padding, pad_on_the_right, reverse_kept_order, swap_images, drop_a_text_token,
    keep_the_next_token,
]  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_the_comparison_notices(tiny, batch, reference, helpers, uneven, monkeypatch, mutate):
    helpers.uneven = uneven
    assert error(tiny, batch, reference, helpers) < 1e-4
    mutate(monkeypatch)
    assert error(tiny, batch, reference, helpers) > NOTICED


def forget_positions(history):
    return replace(history, next=history.mask.sum(1, keepdim=True))


def forget_padding(history):
    return replace(history, mask=torch.ones_like(history.mask))


def answer_one_later(history):
    return replace(history, next=history.next + 1)


@pytest.mark.parametrize("mutate", [forget_positions, forget_padding, answer_one_later], ids=lambda f: f.__name__)
def test_the_second_turn_notices(tiny, batch, uneven, helpers, monkeypatch, mutate):
    def second_turn():
        with torch.no_grad(), attach(tiny.model, uneven, keep=KEEP):
            first = tiny.model.generate(**batch, **helpers.greedy)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12], [14, 15]])], 1)
            return tiny.model.generate(ids, past_key_values=first.past_key_values, **helpers.greedy)

    right, write = second_turn(), turns.History.write
    monkeypatch.setattr(turns.History, "write", lambda self, cache: write(mutate(self), cache))
    assert helpers.gap(second_turn(), right) > NOTICED
