"""Every learned reducer of the register, with random weights, in `forward` and `generate` of every family."""

import pytest
import torch
from families import FAMILIES, VIDEO_FAMILIES, build, one
from hidden import hide
from smallest import LEARNED, shake, sizes_of, smallest

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, available, create
from lit_reduce.runtime import attach

KEEP, TOLERANCE = 0.4, 1e-4  # float32; weights of std 0.25 make logits of about 5
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
# Gemma3's window counts the tokens that are left, so a mask over the full prompt says another thing: see `test_matrix`.
ALL = [family for family in (*FAMILIES, *VIDEO_FAMILIES) if family != "gemma3"]
# What they return is all that the model reads; the others are asked again inside it, and have references of their own.
BEFORE = [
    name for name in LEARNED if available()[name].site == "projector" and available()[name].kind in ("select", "resample")
]
EVERYWHERE = ["llava", "llava_next", "qwen2_5_vl", "gemma3", "smolvlm"]
SERVED = {"llava"}  # no learned reducer may refuse this family


def shaken(model, name: str) -> Reducer:
    return shake(smallest(name, sizes_of(model)), 0.25)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("family", ALL)
def test_dropping_equals_hiding(family, name):
    """In prefill, at every token that stays; batch of two, unequal counts, left padding."""
    tiny = build(family)
    reducer = shaken(tiny.model, name)
    expected = tiny.model(**hide(tiny, tiny.inputs, reducer, KEEP)).logits
    pooled = tiny.model(**hide(tiny, tiny.inputs, create("pool"), KEEP)).logits
    with attach(tiny.model, reducer, keep=KEEP) as attached:
        logits = tiny.model(**tiny.inputs).logits
    seen = attached.logical.selected
    assert 0 < attached.stats.kept < attached.stats.total
    assert float((logits - expected)[seen].abs().max()) < TOLERANCE
    assert float((logits - pooled)[seen].abs().max()) > 0.1, "the weights must matter, or the test proves nothing"


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("family", EVERYWHERE)
def test_a_batch_equals_its_samples_and_detaching_restores_the_model(family, name):
    """Wherever the reducer acts; a family that it cannot serve is refused in one sentence before anything is changed."""
    tiny = build(family)
    reducer, plain = shaken(tiny.model, name), tiny.model.generate(**tiny.inputs, **GREEDY)
    keep = 0.6 if name in ("atp", "mod", "videollm_mod") else 10 if name == "voco" else KEEP
    try:
        with attach(tiny.model, reducer, keep=keep):
            together = tiny.model.generate(**tiny.inputs, **GREEDY)
            alone = [tiny.model.generate(**one(tiny, row), **GREEDY) for row in range(2)]
    except UserError as error:
        assert family not in SERVED, error
        alone, together = [], None
    for row, single in enumerate(alone):
        for mine, other in zip(together.logits, single.logits, strict=True):
            torch.testing.assert_close(mine[row], other[0], atol=TOLERANCE, rtol=0)
    assert together is None or float((together.logits[0] - plain.logits[0]).abs().max()) > 1e-2, "it must do something"
    again = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(mine, other) for mine, other in zip(again.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", LEARNED)
def test_keeping_all_is_bit_identical(name):
    tiny = build("llava")
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, shaken(tiny.model, name), keep=1.0):
        kept = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(mine, other) for mine, other in zip(kept.logits, plain.logits, strict=True))
