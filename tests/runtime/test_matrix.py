"""Every family with every reducer before the language model: dropping a token equals hiding it from the plain model.

A family is a row of ``FAMILIES``, a reducer a row of the register; both are run here as soon as they exist.
"""

import functools
import importlib
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, VIDEO_FAMILIES, Tiny, build, one
from hidden import hide

from lit_reduce.reducer import Reducer, available, create
from lit_reduce.runtime import attach, projector
from lit_reduce.runtime.visual import VisualOutput
from lit_reduce.tokens import Reduction, VisualTokens

compacting = importlib.import_module("lit_reduce.runtime.compact")
TOLERANCE = 1e-4  # float32; weights of std 0.25 make logits of about 5
GREEDY = {
    "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO],  # an untrained model would write placeholders; the logits are as they were
}  # fmt: skip
ALL = [*FAMILIES, *VIDEO_FAMILIES]
KEEP = 0.4


class Uneven(Reducer):
    """Keeps another number of tokens of every image and changes them."""

    name, kind = "uneven", "resample"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        score = tokens.features.sum(-1)
        counts = 1 + (score.abs().sum(1) * 100).long() % keep
        kept_indices = score.topk(keep, dim=1).indices.masked_fill(torch.arange(keep) >= counts[:, None], tokens.count)
        kept_indices = kept_indices.sort(1).values
        valid = kept_indices < tokens.count
        kept_indices = kept_indices.clamp(max=tokens.count - 1)
        x = tokens.features.gather(1, kept_indices[..., None].expand(-1, -1, tokens.features.shape[-1]))
        return Reduction(kept_indices, features=x * 1.5 - 0.1, valid=valid)


def reducers() -> dict[str, Reducer]:
    """What needs no training, at the projector."""
    named = {name: create(name) for name, cls in available().items() if not cls.trained}
    return {"uneven": Uneven()} | {name: reducer for name, reducer in named.items() if reducer.site == "projector"}


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> Tiny:
    """One model for the whole file; Gemma3 with a window that is longer than any prompt (see below for its own)."""
    tiny = build(family, attention)
    tiny.model.requires_grad_(False)
    if family == "gemma3":
        widen(tiny.model, 512)
    return tiny


def widen(model, window: int) -> None:
    model.config.text_config.sliding_window = window
    for layer in model.get_decoder().layers:
        layer.self_attn.sliding_window = window if layer.self_attn.sliding_window is not None else None


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ALL)
def test_keeping_all_is_bit_identical(family):
    tiny = model_of(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    logits = tiny.model(**tiny.inputs).logits
    for name, reducer in reducers().items():
        if name in ("uneven", "random", "grid"):
            with attach(tiny.model, reducer, keep=1.0):
                out = tiny.model.generate(**tiny.inputs, **GREEDY)
                assert torch.equal(tiny.model(**tiny.inputs).logits, logits)
            assert torch.equal(out.sequences, plain.sequences)
            assert gap(out, plain) == 0


@pytest.mark.parametrize("reducer", [*reducers()])
@pytest.mark.parametrize("family", ALL)
def test_dropping_equals_hiding(family, reducer):
    """In prefill, at every token that stays, and at each step after it; batch of two, unequal counts, left padding."""
    tiny, method = model_of(family), reducers()[reducer].eval()
    reference, steps = hide(tiny, tiny.inputs, method, KEEP), GREEDY | {"max_new_tokens": 3}
    prefill = tiny.model(**reference).logits
    expected = tiny.model.generate(**reference, **steps)
    with attach(tiny.model, method, keep=KEEP) as attached:
        logits = tiny.model(**tiny.inputs).logits
        seen = attached.prompt_map.selected
        out = tiny.model.generate(**tiny.inputs, **steps)
    assert 0 < attached.stats.kept < attached.stats.total == int((tiny.inputs["input_ids"] == tiny.token).sum())
    assert float((logits - prefill)[seen].abs().max()) < TOLERANCE
    assert gap(out, expected) < TOLERANCE
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_eager_attention(family):
    tiny = model_of(family, "eager")
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, Uneven(), KEEP), **GREEDY)
    with attach(tiny.model, Uneven(), keep=KEEP):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), expected) < TOLERANCE


@pytest.mark.parametrize("family", ALL)
def test_a_batch_equals_its_samples(family):
    tiny = model_of(family)
    with attach(tiny.model, Uneven(), keep=KEEP):
        together = tiny.model.generate(**tiny.inputs, **GREEDY)
        for row in range(2):
            alone = tiny.model.generate(**one(tiny, row), **GREEDY)
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 4},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 8},
}
# Each way that a family's pictures reach its language model: a list, one tensor, deepstack, mRoPE, a prefix mask.
SOME = ["llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "paligemma", "gemma3", "llava_onevision_video"]
REFUSED = {("paligemma", "chunked prefill"), ("gemma3", "chunked prefill")}  # test_turns has the sentence


@pytest.mark.parametrize(("family", "mode"), [(f, m) for f in SOME for m in MODES if (f, m) not in REFUSED])
def test_modes_of_generate(family, mode):
    """Unequal counts of every picture, in one batch, against the masked model in the same mode."""
    tiny, settings = model_of(family), GREEDY | MODES[mode]
    torch.manual_seed(1)
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, Uneven(), KEEP), **settings)
    torch.manual_seed(1)
    with attach(tiny.model, Uneven(), keep=KEEP):
        out = tiny.model.generate(**tiny.inputs, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "smolvlm"])
def test_prompt_lookup(family):
    tiny = model_of(family)
    single = one(tiny)
    settings = GREEDY | {"prompt_lookup_num_tokens": 2}
    expected = tiny.model.generate(**hide(tiny, single, Uneven(), KEEP), **GREEDY)
    with attach(tiny.model, Uneven(), keep=KEEP):
        out = tiny.model.generate(**single, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


@pytest.mark.parametrize(
    "family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "mistral3", "gemma3"]
)
def test_a_second_turn_continues_the_cache(family):
    """Equals the whole conversation read anew, through the same reducer."""
    tiny = model_of(family)
    with attach(tiny.model, Uneven(), keep=KEEP):
        first = tiny.model.generate(**tiny.inputs, **GREEDY)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])], 1)
        new = ids.shape[1] - tiny.inputs["input_ids"].shape[1]
        turn = {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, new), value=1),
        }
        second = tiny.model.generate(**turn, past_key_values=first.past_key_values, **GREEDY)
        anew = {n: torch.nn.functional.pad(x, (0, new)) for n, x in tiny.inputs.items() if n.endswith("token_type_ids")}
        anew = tiny.model.generate(**tiny.inputs | turn | anew, **GREEDY)
    assert torch.equal(second.sequences, anew.sequences)
    assert gap(second, anew) < TOLERANCE


def test_gemma3_counts_its_window_in_the_tokens_that_are_left():
    """A shortened prompt is what the model reads, so a sliding window reaches further back than in the full prompt."""
    tiny = build("gemma3")
    method, window = reducers()["random"], 12
    reference = hide(tiny, tiny.inputs, method, KEEP)
    seen, kinds = reference["attention_mask"].bool(), tiny.inputs["token_type_ids"]
    length = seen.shape[1]
    block = torch.cat([torch.zeros(2, 1, dtype=torch.long), (kinds.diff(dim=1) == 1).long()], 1).cumsum(1) * kinds
    full, sliding = torch.zeros(2, 2, 1, length, length, dtype=torch.bool)
    for b in range(2):
        for q in range(length):
            for k in range(length):
                same = bool(kinds[b, q] and kinds[b, k] and block[b, q] == block[b, k])
                low, high = min(q, k), max(q, k)
                near = int(seen[b, low:high].sum()) < window
                full[b, 0, q, k] = seen[b, k] and (k <= q or same)
                sliding[b, 0, q, k] = seen[b, k] and ((k <= q and near) or same)
    masks = {"full_attention": full, "sliding_attention": sliding}
    expected = tiny.model(**reference | {"attention_mask": masks}).logits
    with attach(tiny.model, method, keep=KEEP):
        logits = tiny.model(**tiny.inputs).logits
    assert float((logits - expected)[seen].abs().max()) < TOLERANCE
    plain = tiny.model(**reference).logits
    assert float((logits - plain)[seen].abs().max()) > 0.1, "the window must matter, or the test proves nothing"


def test_bfloat16():
    """Eight bits of mantissa: 0.15 of logits of about 5, where other tokens dropped would make a difference above 1."""
    for family in ("llava", "qwen2_5_vl"):
        tiny = build(family)
        model, inputs = tiny.model.bfloat16(), tiny.inputs | {"pixel_values": tiny.inputs["pixel_values"].bfloat16()}
        expected = model(**hide(tiny, inputs, create("random"), KEEP)).logits
        with attach(model, create("random"), keep=KEEP) as attached:
            logits = model(**inputs).logits
        assert float((logits - expected)[attached.prompt_map.selected].abs().max()) < 0.15


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_training_with_checkpointing(family):
    """Loss and gradient of the new features equal those of the masked model."""
    tiny = build(family)
    inputs = tiny.inputs | {"labels": tiny.inputs["input_ids"].clone()}
    inputs["labels"][:, :-2] = -100  # the token before each of them is text, which is never dropped
    method = Uneven()
    method.scale = torch.nn.Parameter(torch.tensor(1.0))
    method.register_forward_hook(lambda m, _, out: replace(out, features=out.features * m.scale))
    losses = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            if checkpointing:
                tiny.model.activation_checkpointing_enable({"use_reentrant": False})
                tiny.model.train()
            with attach(tiny.model, method, keep=KEEP):
                loss = tiny.model(**inputs, use_cache=False).loss
            method.scale.grad = None
            loss.backward()
            losses.append((loss.item(), method.scale.grad.item()))
    reference = hide(tiny, tiny.inputs, method, KEEP)
    expected = tiny.model(**reference, labels=inputs["labels"], use_cache=False).loss
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(float(expected), abs=1e-5)
    assert losses[0][1] != 0


def forget_rows_of_positions(monkeypatch):
    monkeypatch.setattr(compacting, "positions_of", lambda model, inputs, mask: compacting.prompt_positions(mask))


def show_padding(monkeypatch):
    right = compacting.left_padded
    monkeypatch.setattr(compacting, "left_padded", lambda x: (right(x)[0], torch.ones_like(right(x)[1]), False))


def leave_deepstack(monkeypatch):
    right = VisualOutput.of.__func__
    wrong = classmethod(lambda cls, x, levels: right(cls, x, [[y.flip(0) for y in level] for level in levels]))
    monkeypatch.setattr(VisualOutput, "of", wrong)


def swap_pictures(monkeypatch):
    right = projector.reduce_images

    def wrong(*args):
        images = right(*args)
        swapped = [[x[1], x[0], *x[2:]] for x in (images.features, images.kept_indices)]
        return replace(images, features=swapped[0], kept_indices=swapped[1])

    monkeypatch.setattr(projector, "reduce_images", wrong)


MUTATIONS = [
    ("qwen2_5_vl", forget_rows_of_positions), ("internvl", show_padding), ("qwen3_vl", leave_deepstack),
    ("smolvlm", swap_pictures), ("mistral3", show_padding),
]  # fmt: skip


@pytest.mark.parametrize(("family", "mutate"), MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_the_comparison_notices(family, mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        test_dropping_equals_hiding(family, "random")
