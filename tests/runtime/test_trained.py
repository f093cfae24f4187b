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
    name
    for name in LEARNED
    if available()[name].site == "projector" and available()[name].kind in ("select", "resample")
]
# Learned tokens that read one picture inside the language model, at most as many as were learned.
READERS = [name for name in LEARNED if (available()[name].site, available()[name].kind) == ("decoder", "register")]
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
    seen = attached.prompt_map.selected
    assert 0 < attached.stats.kept < attached.stats.total
    assert float((logits - expected)[seen].abs().max()) < TOLERANCE
    assert float((logits - pooled)[seen].abs().max()) > 0.1, "the weights must matter, or the test proves nothing"


def budget(name: str) -> int | float:
    """One that the reducer can meet: between layers it is a mean over layers of which the first see everything."""
    if name in READERS:
        return 10
    return 0.6 if available()[name].site == "decoder" else KEEP


def rows_of(tiny, name: str) -> tuple[dict, list[dict]]:
    """A batch of two prompts of unequal length, and each alone; with one picture each where a reducer asks for that."""
    if name not in READERS:
        return tiny.inputs, [one(tiny, row) for row in range(2)]
    single = one(tiny, 1)
    ids, mask = single["input_ids"], single["attention_mask"]
    longer = torch.cat([ids, ids[:, -1:]], 1)
    short = {"input_ids": ids, "attention_mask": mask, "pixel_values": single["pixel_values"]}
    long = {
        "input_ids": longer,
        "attention_mask": torch.ones_like(longer),
        "pixel_values": single["pixel_values"].flip(2),
    }
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (1, 0)),
        "attention_mask": torch.nn.functional.pad(mask, (1, 0)),
    }
    return {key: torch.cat([padded.get(key, x), long[key]]) for key, x in short.items()}, [short, long]


# tests/reducers/test_voco.py runs readers in the other families, with one picture in each prompt.
PAIRS = [(family, name) for name in LEARNED for family in EVERYWHERE if name not in READERS or family == "llava"]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_batch_equals_its_samples_and_detaching_restores_the_model(family, name):
    """Wherever the reducer acts; a family that it cannot serve is refused in one sentence, and works as before."""
    tiny = build(family)
    inputs, samples = rows_of(tiny, name)
    reducer, plain = shaken(tiny.model, name), tiny.model.generate(**inputs, **GREEDY)
    try:
        with attach(tiny.model, reducer, keep=budget(name)):
            together = tiny.model.generate(**inputs, **GREEDY)
            alone = [tiny.model.generate(**sample, **GREEDY) for sample in samples]
    except UserError:
        if family in SERVED:
            raise
    else:
        for row, single in enumerate(alone):
            for mine, other in zip(together.logits, single.logits, strict=True):
                torch.testing.assert_close(mine[row], other[0], atol=TOLERANCE, rtol=0)
        assert float((together.logits[0] - plain.logits[0]).abs().max()) > 1e-2, "it must do something"
    again = tiny.model.generate(**inputs, **GREEDY)
    assert all(torch.equal(mine, other) for mine, other in zip(again.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in READERS])
def test_keeping_all_is_bit_identical(name):
    tiny = build("llava")
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, shaken(tiny.model, name), keep=1.0):
        kept = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(mine, other) for mine, other in zip(kept.logits, plain.logits, strict=True))
