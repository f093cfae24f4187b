"""Models in wrappers, calls from several threads, caches of any make: served exactly or refused in a sentence."""

import threading
from collections.abc import Iterator

import pytest
import torch
from families import build, one
from hidden import Hidden, hide
from transformers import DynamicCache

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.runtime import attach
from lit_reduce.runtime.cache_compat import CACHE

KEEP = 0.4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


class Adapted(torch.nn.Module):
    """Hands on as `peft.PeftModelForCausalLM` does: inside stands a tuner, and inside that one the model."""

    class Tuner(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name in ("model", "_modules") else getattr(self.model, name)

        def forward(self, *args, **kwargs):
            return self.model.forward(*args, **kwargs)

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = self.Tuner(model), model.config

    def get_base_model(self):
        return self.base_model.model

    def generate(self, *args, **kwargs):
        self.base_model.prepare_inputs_for_generation = self.get_base_model().prepare_inputs_for_generation
        return self.base_model.generate(*args, **kwargs)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_adapters(family):
    tiny = build(family)
    model = Adapted(tiny.model)
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, create("random"), KEEP), **GREEDY)
    with attach(model, "random", keep=KEEP):
        assert gap(model.generate(**tiny.inputs, **GREEDY), expected) < 1e-4
    assert "generate" not in vars(tiny.model)


def test_adapters_that_learn_a_prompt_are_refused():
    model = Adapted(build("llava").model)
    model.active_peft_config = type("Config", (), {"is_prompt_learning": True})()
    with pytest.raises(UserError, match="learn a prompt"):
        attach(model, "random")


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(UserError, match="no method generate"):
        attach(build("llava").model.base_model, "random")
    with pytest.raises(UserError, match="no method generate"):
        attach(torch.nn.DataParallel(build("llava").model), "random")


def test_a_model_compiled_in_place_is_refused():
    tiny = build("llava")
    tiny.model.get_decoder().compile(backend="eager")
    with pytest.raises(UserError, match="compiled in place"):
        attach(tiny.model, "random")


def test_threads_take_turns():
    tiny = build("llava")
    prompts, answers = [one(tiny, 0), one(tiny, 1)], {}
    with attach(tiny.model, "fastv", keep=4):
        expected = [tiny.model.generate(**prompt, **GREEDY) for prompt in prompts]

        def work(number: int) -> None:
            answers[number] = [tiny.model.generate(**prompts[number % 2], **GREEDY) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    assert all(gap(out, expected[number % 2]) == 0 for number, all_ in answers.items() for out in all_)


@pytest.mark.parametrize("name", ["fastv", "lookm"])
def test_a_cache_without_config(name):
    tiny, reducer = build("llava"), create(name)
    with Hidden(tiny, **{reducer.site: reducer}):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, reducer, keep=4):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY, **{CACHE: DynamicCache()}), expected) < 1e-4


@torch.enable_grad()
def test_generate_records_no_gradients(monkeypatch):
    tiny, seen = build("llava"), []
    with attach(tiny.model, create("packer", hidden_size=32, vision_hidden_size=24), keep=KEEP) as attached:
        shorten = attached.session.shorten
        monkeypatch.setattr(attached.session, "shorten", lambda inputs: seen.append(shorten(inputs)) or seen[0])
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert not any(x.requires_grad for x in seen[0][0]["mm_encoder_outputs"]["image"].pooler_output)


def test_packed_samples_are_refused():
    tiny = build("llava")
    first, second = one(tiny, 0), one(tiny, 1)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    places = torch.cat([torch.arange(x["input_ids"].shape[1]) for x in (first, second)])[None]
    with attach(tiny.model, "random", keep=KEEP), pytest.raises(UserError, match="one sample in a row"):
        tiny.model(ids, position_ids=places, pixel_values=tiny.inputs["pixel_values"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_another_call_before_the_first_picture_of_a_conversation(family):
    tiny = build(family)
    other = one(tiny, 1)
    words = torch.tensor([[7, 8, 9]])
    settings, answers = GREEDY | {"suppress_tokens": [100, 101]}, []
    for between in (False, True):
        with attach(tiny.model, "random", keep=KEEP):
            start = tiny.model.generate(words, attention_mask=torch.ones_like(words), **settings)
            if between:
                tiny.model.generate(**one(tiny, 0), **settings)
            ids = torch.cat([start.sequences, other["input_ids"]], 1)
            turn = {name: x for name, x in other.items() if name.startswith(("pixel", "image_grid"))}
            turn |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: getattr(start, CACHE)}
            answers.append(tiny.model.generate(**turn, **settings))
    assert gap(*answers) < 1e-4
