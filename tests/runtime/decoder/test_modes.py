"""Reducers inside the language model in every way of generating and training, and what is refused with a reason."""

import copy
import shutil

import pytest
import torch
from families import build, one
from hidden import Hidden
from transformers import CompileConfig, StaticCache

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.runtime import attach, cache_compat

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
FAMILIES = ["llava", "qwen2_5_vl"]
MODES = {
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "no-cache": {"use_cache": False},
}


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def pyramid():
    return create("pyramiddrop", steps=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_modes_of_generate(family, mode):
    tiny, how = build(family), MODES[mode]
    same = {name: value for name, value in how.items() if name.startswith("num_")}
    with Hidden(tiny, decoder=pyramid(), times=same.get("num_beams", 1)):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY | same)
    with attach(tiny.model, pyramid(), keep=4) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY | how)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE
    assert attached.stats.kept == 12


@pytest.mark.parametrize("name", ["sparsevlm", "efficientvla", "pyramiddrop"])
@torch.no_grad()
def test_a_static_cache_with_room_and_one_prompt_without_padding(name):
    tiny = build("llava")
    tiny = type(tiny)(tiny.model, one(tiny), tiny.token)
    with Hidden(tiny, decoder=create(name)):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY)
    ids, pixels = tiny.inputs["input_ids"], tiny.inputs["pixel_values"]
    store = {cache_compat.CACHE: StaticCache(config=tiny.model.config, max_cache_len=150)}
    with attach(tiny.model, create(name), keep=4):
        out = tiny.model.generate(ids, pixel_values=pixels, **GREEDY, **store)
    assert gap(out, expected) < TOLERANCE


@torch.no_grad()
def test_beams_and_eviction():
    tiny = build("llava")
    with Hidden(tiny, decoder=pyramid(), cache=create("lookm"), times=2):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY, num_beams=2)
    with attach(tiny.model, [pyramid(), "lookm"], keep=4):
        out = tiny.model.generate(**tiny.inputs, **GREEDY, num_beams=2)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


@torch.no_grad()
def test_sampling_several_answers():
    tiny, how = build("llava"), {"do_sample": True, "num_return_sequences": 3, "top_k": 5}
    torch.manual_seed(1)
    with Hidden(tiny, decoder=pyramid(), times=3):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY | how)
    torch.manual_seed(1)
    with attach(tiny.model, pyramid(), keep=4):
        out = tiny.model.generate(**tiny.inputs, **GREEDY | how)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompt_lookup_takes_guesses_back(family):
    tiny = build(family)
    inputs = one(tiny)
    with attach(tiny.model, pyramid(), keep=4):
        expected = tiny.model.generate(**inputs, **GREEDY)
        out = tiny.model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["pyramiddrop", "lookm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_second_turn_on_the_same_cache(family, name):
    tiny, reducer = build(family), create(name)
    more = torch.tensor([[11, 12, 13], [14, 15, 16]])

    def turns():
        first = tiny.model.generate(**tiny.inputs, **GREEDY)
        ids = torch.cat([first.sequences, more], 1)
        mask = tiny.inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        kinds = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in tiny.inputs else {}
        return tiny.model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **kinds, **GREEDY)

    with attach(tiny.model, reducer, keep=4):
        out = turns()
    with Hidden(tiny, **{reducer.site: reducer}):
        expected = turns()
    assert gap(out, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["pyramiddrop", "lookm"])
@torch.no_grad()
def test_a_batch_equals_its_samples(name):
    tiny = build("qwen3_vl")
    with attach(tiny.model, name, keep=4):
        together = tiny.model.generate(**tiny.inputs, **GREEDY)
        for row in range(2):
            alone = tiny.model.generate(**one(tiny, row), **GREEDY)
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "lookm"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(family, name):
    tiny = build(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, name, keep=1.0):
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert gap(out, plain) == 0
    assert torch.equal(out.sequences, plain.sequences)


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    tiny = build("llava")
    ratio = {"decoder": create("fastv")}
    tiny.model.to(torch.bfloat16)
    inputs = tiny.inputs | {"pixel_values": tiny.inputs["pixel_values"].bfloat16()}
    with attach(tiny.model, ratio["decoder"], keep=4):
        out = tiny.model.generate(**inputs, **GREEDY | {"max_new_tokens": 1})
    tiny.inputs["pixel_values"] = inputs["pixel_values"]
    with Hidden(tiny, **ratio):
        expected = tiny.model.generate(**inputs, **GREEDY | {"max_new_tokens": 1})
    # Eight bits of mantissa through five layers: a few per cent of logits of about 5. Anything wrong costs more than 1.
    assert gap(out, expected) < 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_training(family, checkpointing):
    tiny = build(family)
    weight = tiny.model.get_decoder().layers[0].self_attn.k_proj.weight
    inputs = tiny.inputs | {"labels": tiny.inputs["input_ids"].clone()}
    inputs["labels"][:, :-1] = -100  # the answer: one word, which no reducer may see
    tiny.model.train()
    if checkpointing:
        tiny.model.activation_checkpointing_enable({"use_reentrant": False})
    with attach(tiny.model, pyramid(), keep=4):
        loss = tiny.model(**inputs, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, weight)
    # The reference ranks by the last column, so there the prompt ends before the answer.
    with Hidden(tiny, decoder=pyramid(), answer=1):
        expected = tiny.model(**inputs, use_cache=False).loss
        (wanted,) = torch.autograd.grad(expected, weight)
    assert abs(float((loss - expected).detach())) < 1e-5
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_compiled_decode_steps(backend, tmp_path, monkeypatch):
    """Traced in one graph; by inductor also built with the C++ compiler, on as few layers as can drop anything."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tiny, reducer = build("llava"), pyramid()
    if backend == "inductor":
        del tiny.model.get_decoder().layers[2:]
        tiny.model.config.text_config.num_hidden_layers = 2
        reducer = create("fastv", layer=1)
    compiled = CompileConfig(fullgraph=True, mode=None, backend=backend)
    compiled._compile_all_devices = True
    with attach(tiny.model, reducer, keep=4):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY)
        out = tiny.model.generate(**tiny.inputs, **GREEDY, cache_implementation="static", compile_config=compiled)
        assert "_compiled_call" in vars(tiny.model)
    assert "_compiled_call" not in vars(tiny.model)
    assert gap(out, expected) < TOLERANCE


# What cannot be right -------------------------------------------------------------------------------------------------

REFUSED = {
    "pieces": ("fastv", {"prefill_chunk_size": 8}, "prefill_chunk_size"),
    "assistant": ("lookm", {"prompt_lookup_num_tokens": 2}, "assisted decoding"),
    "nothing to forget": ("lookm", {"use_cache": False}, "nothing to act on"),
    "fixed size": ("lookm", {"cache_implementation": "static"}, "fixed size"),
    "too many": ("fastv", {}, "has only"),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_refusals_leave_a_working_model(case):
    tiny, (name, how, reason) = build("qwen2_5_vl"), REFUSED[case]
    before = tiny.model.generate(**tiny.inputs, **GREEDY)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules())
    configs = [getattr(m, "config", None) for m in tiny.model.modules()]
    with attach(tiny.model, name, keep=99 if case == "too many" else 4), pytest.raises(UserError, match=reason):
        tiny.model.generate(**tiny.inputs, **GREEDY | how)
    assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), before) == 0
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()) == hooks
    assert all(a is getattr(m, "config", None) for a, m in zip(configs, tiny.model.modules(), strict=True))


def test_bad_combinations_are_told_at_once():
    model = build("llava").model
    with pytest.raises(UserError, match="both act at the decoder"):
        attach(model, ["fastv", "pyramiddrop"])
    with pytest.raises(UserError, match="layers 0 to 4"):
        attach(model, create("fastv", layer=5), keep=4)
    with pytest.raises(UserError, match="36 visual tokens"):
        attach(model, "fastv", keep=37)
    with pytest.raises(UserError, match="2 budgets"):
        attach(model, ["grid", "fastv", "lookm"], keep=[4, 4])
    with pytest.raises(UserError, match="layer=0: give above 0"):
        create("fastv", layer=0)
    assert "_lit_reduce" not in vars(model)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


@torch.no_grad()
def test_all_four_sites_in_one_attach():
    tiny = build("llava")
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, ["tome", "grid", "fastv", "lookm"], keep=[30, 12, 6, 3]) as attached:
        first = tiny.model.generate(**tiny.inputs, **GREEDY)
        for row in range(2):  # no reference hides at four places; that a batch equals its samples still must hold
            alone = tiny.model.generate(**one(tiny, row), **GREEDY)
            for a, b in zip(first.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE
    assert attached.stats.layers == (12, 12, 6, 6, 6)
    assert attached.stats.cached == (3,) * 5
    assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), plain) == 0


@torch.no_grad()
def test_a_cache_outlives_no_reducer():
    tiny = build("llava")
    with attach(tiny.model, "fastv", keep=4):
        cache = tiny.model(**tiny.inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask}
        tiny.model(**step, past_key_values=copy.deepcopy(cache))
    with pytest.raises(UserError, match="with a reducer attached"):
        tiny.model(**step, past_key_values=cache)


@torch.no_grad()
def test_a_prompt_without_image_and_an_error_inside():
    tiny = build("llava")
    words = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    plain, boom = tiny.model.generate(**words, **GREEDY), RuntimeError("boom")

    def fail(*_):
        raise boom

    with attach(tiny.model, ["grid", "fastv", "lookm"], keep=[9, 4, 3]) as attached:
        first = tiny.model.generate(**tiny.inputs, **GREEDY)
        handle = tiny.model.get_decoder().layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            tiny.model.generate(**tiny.inputs, **GREEDY)
        handle.remove()
        assert gap(tiny.model.generate(**words, **GREEDY), plain) == 0
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), first) == 0
        assert attached.stats.total == 108
        assert attached.stats.layers == (27, 27, 12, 12, 12)
        assert attached.stats.cached == (9,) * 5


@pytest.mark.parametrize("move", ["double", "compile"])
@torch.no_grad()
def test_a_model_that_moves_after_attach(move):
    tiny, inputs = build("llava"), None
    with attach(tiny.model, "fastv", keep=4):
        expected = tiny.model(**tiny.inputs).logits
        inputs = dict(tiny.inputs)
        if move == "double":
            tiny.model.double()
            inputs["pixel_values"] = inputs["pixel_values"].double()
            out = tiny.model(**inputs).logits
        else:
            out = torch.compile(tiny.model, backend="eager")(**inputs).logits
    assert float((out - expected).abs().max()) < TOLERANCE
