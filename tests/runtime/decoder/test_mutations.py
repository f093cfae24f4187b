"""Tests of the tests: break what happens inside the language model on purpose; the masked model must notice."""

import pytest
import torch
from families import build
from hidden import Hidden

from lit_reduce.reducer import create
from lit_reduce.runtime import attach
from lit_reduce.runtime.decoder.attention_rows import AttentionRows
from lit_reduce.runtime.decoder.hooks import DecoderHooks
from lit_reduce.runtime.decoder.prefill_state import PrefillState
from lit_reduce.runtime.decoder.slot_cache import PAD, SlotLayer

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
NOTICED = 1e-2
mask, narrow, before, aim = PrefillState.mask, PrefillState.narrow, DecoderHooks._before, AttentionRows.aim


def show_padding(monkeypatch):
    def wrong(self, logical, keys, *rest):
        return mask(self, logical, torch.where(keys == PAD, keys.amax(1, keepdim=True), keys), *rest)

    monkeypatch.setattr(PrefillState, "mask", wrong)


def renumber_positions(monkeypatch):
    def wrong(self, number, layer, args, kwargs):
        embeddings = kwargs["position_embeddings"]
        found = before(self, number, layer, args, kwargs)
        if self._state is not None and self._state.index is not None:
            length = self._state.index.shape[1]
            kwargs["position_embeddings"] = tuple(x[:, :length] for x in embeddings)
        return found

    monkeypatch.setattr(DecoderHooks, "_before", wrong)


def flip_slots(monkeypatch):
    def wrong(self, hidden, gone):
        out = narrow(self, hidden, gone)
        self.index, self.slots = self.index.flip(1), self.slots.flip(1)
        return out

    monkeypatch.setattr(PrefillState, "narrow", wrong)


def forget_slots_in_the_cache(monkeypatch):
    def wrong(self, keep):
        slots = self.slots
        evict(self, keep)
        self.slots = slots[:, : self.slots.shape[1]]

    evict = SlotLayer.evict
    monkeypatch.setattr(SlotLayer, "evict", wrong)


def report_the_physical_length(monkeypatch):
    monkeypatch.setattr(SlotLayer, "get_seq_length", lambda self: 0 if self.slots is None else self.slots.shape[1])


def read_one_row_too_early(monkeypatch):
    def wrong(self, layer, state, offset):
        aim(self, layer, state, offset)
        if layer in self._probes:
            self._probes[layer].asked = (self._probes[layer].asked - 1).clamp(min=0)

    monkeypatch.setattr(AttentionRows, "aim", wrong)


def read_the_neighbours_columns(monkeypatch):
    monkeypatch.setattr(AttentionRows, "aim", lambda self, layer, state, offset: aim(self, layer, state, offset + 1))


def keep_the_neighbours(monkeypatch):
    def wrong(self, hidden, gone):
        return narrow(self, hidden, [(picture, stay.roll(1)) for picture, stay in gone])

    monkeypatch.setattr(PrefillState, "narrow", wrong)


MUTATIONS = [
    show_padding, renumber_positions, flip_slots, forget_slots_in_the_cache, report_the_physical_length,
    read_one_row_too_early, read_the_neighbours_columns, keep_the_neighbours,
]  # fmt: skip


def error() -> float:
    tiny = build("qwen2_5_vl")  # its images differ in size, so a ratio keeps unequal counts
    with torch.no_grad(), Hidden(tiny, decoder=create("pyramiddrop"), cache=create("lookm"), keep=0.3):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY)
    with torch.no_grad(), attach(tiny.model, ["pyramiddrop", "lookm"], keep=0.3):
        try:
            out = tiny.model.generate(**tiny.inputs, **GREEDY)
        except (RuntimeError, IndexError):  # noticed by torch
            return float("inf")
    return max(float((x - y).abs().max()) for x, y in zip(out.logits, expected.logits, strict=True))


def test_nothing_broken():
    assert error() < 1e-4


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_the_comparison_notices(monkeypatch, mutate):
    mutate(monkeypatch)
    assert error() > NOTICED
