"""The phases of one ``generate``, with parts that take a known time."""

import time

import pytest
import torch
from families import build, one

from lit_reduce.benchmark.phase_timer import PhaseTimer
from lit_reduce.reducer import create
from lit_reduce.runtime import attach


class Slow:
    """Makes a module take some milliseconds longer."""

    def __init__(self, module, milliseconds):
        module.register_forward_pre_hook(lambda *_: time.sleep(milliseconds / 1000))


@torch.inference_mode()
def phases(model, inputs, new_tokens, reducer=None):
    with PhaseTimer(model, reducer) as watch:
        model.generate(**inputs, streamer=watch, do_sample=False, max_new_tokens=new_tokens)
    return watch.phases()


def test_every_phase_gets_its_own_time():
    tiny = build("llava")
    model, inputs = tiny.model, one(tiny, 1)
    phases(model, inputs, 2)
    Slow(model.get_encoder("image"), 200)
    Slow(model.get_decoder(), 40)
    seen = phases(model, inputs, 4)
    assert 40 <= seen.prefill < 200
    assert seen.first_token >= seen.prefill + 200
    assert 40 <= seen.decode < 200
    assert seen.reducer == 0


def test_the_reducer_is_timed_by_itself_and_inside_the_first_token():
    tiny = build("llava")
    reducer = create("grid")
    Slow(reducer, 150)
    with attach(tiny.model, reducer, keep=4):
        seen = phases(tiny.model, one(tiny, 1), 1, reducer)
    assert seen.reducer >= 150
    assert seen.first_token > seen.reducer > seen.prefill
    assert seen.decode == 0


def test_looking_back_at_later_tokens_is_part_of_them():
    tiny = build("llava")
    reducer = create("flexattention", hidden_size=32, depth=5, key_size=16, first=4, threshold=-1.0)
    Slow(reducer, 150)
    with attach(tiny.model, reducer, keep=4):
        seen = phases(tiny.model, one(tiny, 1), 3, reducer)
    assert 300 <= seen.reducer < 600  # shortening, and the prompt's last token in one layer
    assert seen.decode >= 150


def test_the_processor_clock_does_not_count_waiting():
    tiny = build("llava")
    Slow(tiny.model.get_decoder(), 300)
    with PhaseTimer(tiny.model, clock="cpu") as watch:
        tiny.model.generate(**one(tiny, 1), streamer=watch, do_sample=False, max_new_tokens=1)
    assert 0 < watch.phases().prefill < 250


def test_nothing_stays_behind_when_generate_fails():
    tiny = build("llava")
    with pytest.raises(AttributeError), PhaseTimer(tiny.model, create("grid")) as watch:
        tiny.model.generate(streamer=watch, input_ids="nonsense")
    assert not tiny.model._forward_hooks
    assert not tiny.model._forward_pre_hooks
