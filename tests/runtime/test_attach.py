"""An attached model behaves like the plain model that cannot see the dropped tokens, in every mode of ``generate``."""

import copy
import hashlib
import inspect
from contextlib import suppress

import pytest
import torch
from families import build
from transformers import GenerationConfig

from lit_reduce.errors import UserError
from lit_reduce.plugin import PluginConfig, save_plugin
from lit_reduce.reducer import create
from lit_reduce.runtime import attach, encode

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_keeping_all_is_bit_identical(tiny, batch, reducer, helpers):
    plain = tiny.model.generate(**batch, **helpers.greedy)
    for keep in (36, 1.0):
        with attach(tiny.model, reducer, keep=keep) as attached:
            out = tiny.model.generate(**batch, **helpers.greedy)
            forward = tiny.model(**batch).logits
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
        assert torch.equal(forward, tiny.model(**batch).logits)
        assert (attached.stats.kept, attached.stats.total, attached.stats.reducer_ms) == (108, 108, 0.0)


def test_keeping_all_runs_neither_reducer_nor_taps(tiny, batch, monkeypatch):
    reducer = create("fastervlm")
    monkeypatch.setattr(reducer, "forward", None)
    monkeypatch.setattr("lit_reduce.runtime.attention.probe.AttentionProbe.see", None)
    with attach(tiny.model, reducer, keep=36):
        tiny.model.generate(**batch, max_new_tokens=1)


def test_dropping_equals_hiding_at_every_step(tiny, batch, reducer, reference, helpers):
    plain = tiny.model.generate(**batch, **helpers.greedy)
    expected = tiny.model.generate(**reference(batch, reducer), **helpers.greedy)
    with attach(tiny.model, reducer, keep=helpers.keep) as attached:
        out = tiny.model.generate(**batch, **helpers.greedy)
    assert helpers.gap(out, expected) < TOLERANCE
    assert torch.equal(out.sequences, expected.sequences)
    assert helpers.gap(out, plain) > 0.1, "the reduction must matter, or the test proves nothing"
    assert 0 < attached.stats.kept <= 30
    assert attached.stats.total == 108
    assert attached.stats.reducer_ms > 0


def test_dropping_equals_hiding_in_prefill(tiny, batch, reducer, reference, helpers):
    expected = tiny.model(**reference(batch, reducer)).logits
    with attach(tiny.model, reducer, keep=helpers.keep) as attached:
        logits = tiny.model(**batch).logits
    seen = attached.prompt_map.selected
    assert logits.shape == expected.shape
    assert float((logits - expected)[seen].abs().max()) < TOLERANCE
    assert not logits[~seen].any()


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"use_cache": False},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids="-".join,
)
def test_modes_of_generate(tiny, batch, uneven, reference, helpers, mode):
    same = {key: value for key, value in mode.items() if key in ("num_beams", "num_return_sequences")}
    expected = tiny.model.generate(**reference(batch, uneven), **helpers.greedy | same)
    with attach(tiny.model, uneven, keep=helpers.keep):
        out = tiny.model.generate(**batch, **helpers.greedy | mode)
    assert torch.equal(out.sequences, expected.sequences)
    assert helpers.gap(out, expected) < TOLERANCE


@pytest.mark.parametrize("how", [{"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}])
def test_no_cache_and_no_padding(tiny, pictures, uneven, reference, helpers, how):
    # generate drops a mask of ones; without a cache the gaps in the positions then look like packed samples.
    single = tiny.prepare([pictures[0]], ["what is here ?"])
    expected = tiny.model.generate(**reference(single, uneven), **helpers.greedy)
    with attach(tiny.model, uneven, keep=helpers.keep):
        out = tiny.model.generate(**single, **helpers.greedy, **how)
    assert helpers.gap(out, expected) < TOLERANCE


def test_sampling_several_sequences(tiny, batch, uneven, reference, helpers):
    mode = helpers.greedy | {"do_sample": True, "num_return_sequences": 3, "top_k": 5}
    torch.manual_seed(1)
    expected = tiny.model.generate(**reference(batch, uneven), **mode)
    torch.manual_seed(1)
    with attach(tiny.model, uneven, keep=helpers.keep):
        out = tiny.model.generate(**batch, **mode)
    assert out.sequences.shape == (6, batch["input_ids"].shape[1] + 5)
    assert torch.equal(out.sequences, expected.sequences)


def test_a_batch_equals_its_samples(tiny, pictures, reducer, helpers):
    images, prompts = [pictures[:2], pictures[2], None], ["what is the red w30 here ?", "is big ?", "w40 w41"]
    with attach(tiny.model, reducer, keep=helpers.keep):
        together = tiny.model.generate(**tiny.prepare(images, prompts), **helpers.greedy)
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            alone = tiny.model.generate(**tiny.prepare([image], [prompt]), **helpers.greedy)
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE


def test_a_prompt_without_image_passes(tiny, helpers):
    text = tiny.prepare([None, None], ["what is the red w30 ?", "w40"])
    plain = tiny.model.generate(**text, **helpers.greedy)
    with attach(tiny.model, create("grid"), keep=4) as attached:
        out = tiny.model.generate(**text, **helpers.greedy)
    assert torch.equal(out.sequences, plain.sequences)
    assert helpers.gap(out, plain) == 0
    assert attached.stats.total == 0


def test_what_was_shared_serves_the_next_call_alone(tiny, batch, helpers):
    text = tiny.prepare([None], ["w40"])
    other = encode(tiny.model, batch | {"pixel_values": batch["pixel_values"].flip(0)})
    with attach(tiny.model, "grid", keep=helpers.keep) as attached:
        expected = tiny.model.generate(**batch, **helpers.greedy)
        attached.share(other)
        tiny.model.generate(**text, **helpers.greedy)
        assert helpers.gap(tiny.model.generate(**batch, **helpers.greedy), expected) == 0
        attached.share(other)
        assert helpers.gap(tiny.model.generate(**batch, **helpers.greedy), expected) > 0.1


def test_lengths_count_the_dropped_tokens(tiny, batch, helpers):
    length = batch["input_ids"].shape[1]
    with attach(tiny.model, create("grid"), keep=4):
        out = tiny.model.generate(**batch, max_length=length + 3, do_sample=False)
        config = copy.deepcopy(tiny.model.generation_config)
        config.max_length, config.do_sample = length + 2, False
        shorter = tiny.model.generate(batch.pop("input_ids"), config, **batch)
    assert out.shape[1] == length + 3
    assert torch.equal(out[:, : length + 2], shorter)


def test_without_a_mask_padding_is_recognised(tiny, batch, uneven, helpers):
    with attach(tiny.model, uneven, keep=helpers.keep):
        masked = tiny.model.generate(**batch, **helpers.greedy)
        del batch["attention_mask"]
        guessed = tiny.model.generate(**batch, **helpers.greedy)
    assert helpers.gap(masked, guessed) == 0


def _state(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_detach_restores_the_model(tiny, batch, helpers):
    model = tiny.model
    model.generate(**batch, max_new_tokens=1)  # transformers installs its own capture hooks at first use
    before, attributes, configs = _state(model), set(vars(model)), [getattr(m, "config", None) for m in model.modules()]
    kind, hooks, signature = type(model), _hooks(model), inspect.signature(model.forward)
    attached = attach(model, create("fastervlm"), keep=helpers.keep)
    assert inspect.signature(model.forward) == signature, "transformers reads it"
    assert list(model.state_dict()) == list(kind(model.config).state_dict())
    model.generate(**batch, max_new_tokens=2)
    attached.detach()
    attached.detach()
    assert (type(model), _state(model), set(vars(model)), _hooks(model)) == (kind, before, attributes, hooks)
    assert all(a is getattr(m, "config", None) for a, m in zip(configs, model.modules(), strict=True))
    assert "generate" not in vars(model)


SITES = {
    "projector": ("qwen3_vl", ["random"], 4),
    "encoder": ("llava", ["tome"], 12),
    "encoder, given back": ("smolvlm", ["evit"], 16),
    "encoder, packed": ("qwen3_vl", ["evit"], 4),
    "decoder": ("qwen3_vl", ["pyramiddrop"], 4),
    "cache": ("gemma3", ["lookm"], 3),
    "all": ("llava", ["evit", "random", "pyramiddrop", "lookm"], [20, 9, 5, 3]),
}


def everything(model):
    """All that a model consists of: types, attributes, hooks and their order, weights, settings."""

    def mark(x):
        return [(key, id(value)) for key, value in x.items()] if isinstance(x, dict) else id(x)

    parts = [
        (type(m), {name: mark(x) for name, x in vars(m).items() if name != "rope_deltas"}) for m in model.modules()
    ]  # transformers leaves rope_deltas behind itself
    return parts, _state(model), model.config.to_json_string(), model.generation_config.to_json_string()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("fails", [False, True], ids=["used", "failed"])
def test_every_site_is_restored_byte_for_byte(site, fails):
    family, names, keep = SITES[site]
    tiny = build(family)
    plain = tiny.model.generate(**tiny.inputs, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    before = everything(tiny.model)
    head = tiny.model.get_output_embeddings()
    with suppress(RuntimeError), attach(tiny.model, names, keep=keep):
        assert everything(tiny.model)[0] != before[0]
        if fails:
            handle = head.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny.model.generate(**tiny.inputs, max_new_tokens=2)
            handle.remove()
            raise RuntimeError
        tiny.model.generate(**tiny.inputs, max_new_tokens=2)
        tiny.model(**tiny.inputs)
    assert everything(tiny.model) == before
    again = tiny.model.generate(**tiny.inputs, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


def test_methods_that_others_put_on_the_model_come_back(tiny, batch, uneven, helpers):
    own, calls = tiny.model.forward, []

    def counted(*args, **kwargs):  # as accelerate does for a model that is spread over devices
        calls.append(1)
        return own(*args, **kwargs)

    tiny.model.forward = counted
    with attach(tiny.model, uneven, keep=helpers.keep):
        tiny.model.generate(**batch, max_new_tokens=2)
        tiny.model(**batch)
    assert len(calls) == 3
    assert tiny.model.forward is counted


def test_an_exception_inside_detaches_and_leaves_a_working_model(tiny, batch, uneven, helpers):
    plain = tiny.model.generate(**batch, **helpers.greedy)
    boom = RuntimeError("boom")

    def fail(*_):
        raise boom

    handle = tiny.model.get_decoder().layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"), attach(tiny.model, uneven, keep=helpers.keep):
        tiny.model.generate(**batch, **helpers.greedy)
    handle.remove()
    assert not {"generate", "forward", "_lit_reduce"} & set(vars(tiny.model))
    assert helpers.gap(tiny.model.generate(**batch, **helpers.greedy), plain) == 0


def test_an_exception_inside_generate_leaves_the_attachment_usable(tiny, batch, uneven, helpers):
    with attach(tiny.model, uneven, keep=helpers.keep):
        first = tiny.model.generate(**batch, **helpers.greedy)
        with pytest.raises(ValueError, match="model_kwargs"):
            tiny.model.generate(**batch, **helpers.greedy, nonsense=1)
        tiny.model(**batch)
        assert helpers.gap(tiny.model.generate(**batch, **helpers.greedy), first) == 0


def test_a_copy_of_an_attached_model_is_attached_itself(tiny, batch, uneven, helpers):
    with attach(tiny.model, uneven, keep=helpers.keep):
        twin = copy.deepcopy(tiny.model)
        expected = tiny.model.generate(**batch, **helpers.greedy)
    twin.lm_head.weight.mul_(2)
    out = twin.generate(**batch, **helpers.greedy)
    assert torch.equal(out.logits[0], expected.logits[0] * 2)


def test_gradients_reach_only_the_reducer(tiny, batch, uneven, helpers):
    before = _state(tiny.model)
    labels = batch["input_ids"].where(
        torch.arange(batch["input_ids"].shape[1]) >= batch["input_ids"].shape[1] - 3, -100
    )
    with torch.enable_grad(), attach(tiny.model, uneven, keep=helpers.keep):
        loss = tiny.model(**batch, labels=labels).loss
        loss.backward()
    assert float(uneven.mix.weight.grad.abs().max()) > 0
    assert all(weight.grad is None for weight in tiny.model.parameters())
    torch.optim.SGD(uneven.parameters(), lr=1.0).step()
    assert _state(tiny.model) == before


def test_loss_equals_that_of_the_masked_model(tiny, batch, uneven, reference, helpers):
    labels = batch["input_ids"].where(
        torch.arange(batch["input_ids"].shape[1]) >= batch["input_ids"].shape[1] - 3, -100
    )
    expected = tiny.model(**reference(batch, uneven), labels=labels).loss
    with attach(tiny.model, uneven, keep=helpers.keep):
        out = tiny.model(**batch, labels=labels)
        last = tiny.model(**batch, logits_to_keep=2).logits
        tuple_loss = tiny.model(**batch, labels=labels, return_dict=False)[0]
    assert float((out.loss - expected).abs()) < TOLERANCE
    assert float((tuple_loss - expected).abs()) < TOLERANCE
    assert torch.allclose(last, out.logits[:, -2:], atol=1e-5)


def test_renumber_closes_the_gaps(tiny, batch, helpers):
    reducer = create("grid")
    with attach(tiny.model, reducer, keep=helpers.keep, positions="renumber"):
        out = tiny.model.generate(**batch, **helpers.greedy)
    with attach(tiny.model, reducer, keep=helpers.keep) as kept:
        other = tiny.model.generate(**batch, **helpers.greedy)
    order, valid = kept.prompt_map.order, kept.prompt_map.valid
    features = tiny.model.get_image_features(batch["pixel_values"]).pooler_output
    embeds = tiny.model.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter((batch["input_ids"] == 3)[..., None], torch.cat(list(features)))
    short = embeds.gather(1, order[..., None].expand(-1, -1, 32))
    expected = tiny.model.generate(inputs_embeds=short, attention_mask=valid.long(), **helpers.greedy)
    assert helpers.gap(out, expected) < TOLERANCE
    assert helpers.gap(out, other) > 0.1


def test_by_name_and_by_plugin(tiny, batch, tmp_path, helpers):
    reducer = create("grid")
    config = PluginConfig("grid", {}, tiny.identity, [10], positions="renumber")
    save_plugin(tmp_path / "plug", reducer, config)
    with attach(tiny.model, "grid", keep=helpers.keep, positions="renumber"):
        named = tiny.model.generate(**batch, **helpers.greedy)
    with attach(tiny.model, tmp_path / "plug", keep=helpers.keep) as attached:
        loaded = tiny.model.generate(**batch, **helpers.greedy)
    assert attached.positions == "renumber"
    assert helpers.gap(named, loaded) == 0


def test_a_plugin_of_another_backbone_is_refused(tiny, tmp_path):
    other = copy.copy(tiny.identity)
    other.hash = "0" * 64
    save_plugin(tmp_path / "plug", create("grid"), PluginConfig("grid", {}, other, [10]))
    with pytest.raises(UserError, match="backbone"):
        attach(tiny.model, tmp_path / "plug")


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "at least 1"), (-3, "at least 1"), (37, "only 36"), (1.5, "ratio"), ("many", "number")]
)
def test_a_budget_out_of_range_is_refused_at_once(tiny, keep, message):
    with pytest.raises(UserError, match=message):
        attach(tiny.model, "grid", keep=keep)
    assert "_lit_reduce" not in vars(tiny.model)


def test_misuse_is_refused_with_a_sentence(tiny, batch):
    with pytest.raises(UserError, match="did you mean 'grid'"):
        attach(tiny.model, "gird", keep=4)
    with attach(tiny.model, "grid", keep=4) as first:
        with pytest.raises(UserError, match="already"):
            attach(tiny.model, "random", keep=4)
        assert vars(tiny.model)["_lit_reduce"] is first
        with pytest.raises(UserError, match="image tokens"):
            tiny.model.generate(**batch | {"pixel_values": batch["pixel_values"][:2]}, max_new_tokens=1)
        with pytest.raises(UserError, match="input_ids"):
            tiny.model.generate(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=batch["pixel_values"])
        with pytest.raises(UserError, match="mm_encoder_outputs"):
            tiny.model.generate(batch["input_ids"], mm_encoder_outputs={"image": object()})
    with pytest.raises(UserError, match="positions"), attach(tiny.model, "grid", keep=4, positions="odd"):
        tiny.model.generate(**batch)
