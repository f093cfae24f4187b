"""Whoever counts tokens during ``generate`` counts those of the caller's prompt."""

from collections.abc import Iterator

import pytest
import torch
from families import build
from transformers import LogitsProcessor, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lit_reduce.runtime import attach

KEEP = 0.4


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class After(StoppingCriteria):
    """Stops after two tokens."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores, **kwargs):
        assert torch.equal(input_ids[:, : self.ids.shape[1]], self.ids.repeat_interleave(len(input_ids) // 2, 0))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.ids.shape[1] + 2)


class Grammar(LogitsProcessor):
    """Lets nothing but 10, 11, 12 pass."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        assert torch.equal(input_ids[:, : self.ids.shape[1]], self.ids.repeat_interleave(len(input_ids) // 2, 0))
        allowed = 10 + input_ids.shape[1] - self.ids.shape[1]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([allowed]), 0)


MODES = [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]


@pytest.mark.parametrize("mode", MODES)
def test_criteria_processors_and_prefixes(mode):
    tiny = build("llava")
    ids = tiny.inputs["input_ids"]
    length, rows = ids.shape[1], 2 * mode.get("num_return_sequences", 1)

    def allowed(row, sentence):
        assert torch.equal(sentence[:length], ids[row // mode.get("num_return_sequences", 1)])
        return [10 + len(sentence) - length]

    with attach(tiny.model, "random", keep=KEEP):
        for how in ({"logits_processor": [Grammar(ids)]}, {"prefix_allowed_tokens_fn": allowed}):
            out = tiny.model.generate(**tiny.inputs, max_new_tokens=3, **how, **mode)
            assert out[:, length:].tolist() == [[10, 11, 12]] * rows
        out = tiny.model.generate(**tiny.inputs, max_new_tokens=6, stopping_criteria=[After(ids)], **mode)
        assert out.shape == (rows, length + 2)
    assert "_merge_criteria_processor_list" not in vars(tiny.model)


def test_a_criterion_that_stands_for_one_of_generate():
    tiny = build("llava")
    length = tiny.inputs["input_ids"].shape[1]
    longer = StoppingCriteriaList([MaxLengthCriteria(length + 4)])
    with attach(tiny.model, "random", keep=KEEP):
        assert tiny.model.generate(**tiny.inputs, max_new_tokens=2, stopping_criteria=longer).shape[1] == length + 4


class Streamer(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.seen.append(None)


def test_a_streamer_gets_the_whole_prompt():
    tiny, streamer = build("llava"), Streamer()
    with attach(tiny.model, "random", keep=KEEP):
        out = tiny.model.generate(**tiny.inputs, max_new_tokens=2, do_sample=False, streamer=streamer)
    prompt, *answer, end = streamer.seen
    assert torch.equal(prompt, tiny.inputs["input_ids"])
    assert torch.equal(torch.cat([prompt, torch.stack(answer, 1)], 1), out)
    assert end is None
