"""Settings of ``generate`` count wherever they stand: a keyword, the config that is passed, the model's own config."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import PAD, build, one
from hidden import hide
from transformers import GenerationConfig

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.runtime import attach

KEEP = 0.4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
PLACES = ["keyword", "passed", "model"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def gap(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def placed(tiny: Any, place: str, **settings: Any) -> dict[str, Any]:
    """Arguments of ``generate`` that carry settings at one of the places."""
    if place == "keyword":
        return settings
    if place == "passed":
        return {"generation_config": GenerationConfig(**settings)}
    for name, value in settings.items():
        setattr(tiny.model.generation_config, name, value)
    return {"generation_config": GenerationConfig()}


@pytest.mark.parametrize("place", PLACES)
def test_use_cache(place):
    tiny = build("llava")
    tiny = type(tiny)(tiny.model, one(tiny), tiny.token)
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, create("random"), KEEP), **GREEDY)
    how = placed(tiny, place, use_cache=False)
    with attach(tiny.model, "random", keep=KEEP):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY, **how), expected) < 1e-4


@pytest.mark.parametrize("place", PLACES)
def test_pad_token_tells_the_mask(place):
    tiny = build("llava")
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, create("random"), KEEP), **GREEDY)
    tiny.model.generation_config.pad_token_id = 3
    how = placed(tiny, place, pad_token_id=PAD)
    with attach(tiny.model, "random", keep=KEEP):
        out = tiny.model.generate(tiny.inputs["input_ids"], pixel_values=tiny.inputs["pixel_values"], **GREEDY, **how)
    assert gap(out, expected) < 1e-4


@pytest.mark.parametrize("place", PLACES)
def test_lengths(place):
    tiny = build("llava")
    length = tiny.inputs["input_ids"].shape[1]
    how = placed(tiny, place, max_length=length + 4, min_length=length + 2, eos_token_id=[*range(3, 60)])
    with attach(tiny.model, "random", keep=KEEP):
        out = tiny.model.generate(**tiny.inputs, do_sample=False, suppress_tokens=[*range(60, 120)], **how)
    assert out.shape[1] == length + 3  # two that may not end, and one that does


@pytest.mark.parametrize("place", PLACES)
def test_what_is_refused(place):
    tiny = build("llava")
    how = placed(tiny, place, prefill_chunk_size=8)
    with attach(tiny.model, "fastv", keep=4), pytest.raises(UserError, match="prefill_chunk_size"):
        tiny.model.generate(**tiny.inputs, **GREEDY, **how)
