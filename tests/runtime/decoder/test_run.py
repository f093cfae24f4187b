"""The training path computes what the model computes, and what the gathered stream computes."""

import pytest
import torch
from families import FAMILIES, VIDEO_FAMILIES, build
from shortening import compact

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.runtime import attach, encode, run_decoder
from lit_reduce.runtime.decoder import run as running
from lit_reduce.runtime.decoder.run import embed
from lit_reduce.runtime.positions import prompt_positions
from lit_reduce.runtime.visual import VisualOutput

HIDDEN = torch.finfo(torch.float32).min


def test_full_prompt_equals_forward(tiny, batch):
    encoded = encode(tiny.model, batch)
    assert torch.allclose(run_decoder(tiny.model, batch, encoded.features), tiny.model(**batch).logits, atol=1e-5)


EAGER = ["qwen3_vl", "gemma3", "paligemma"]  # one of each kind of mask


@pytest.mark.parametrize(
    ("family", "attention"),
    [(name, "sdpa") for name in [*FAMILIES, *VIDEO_FAMILIES]] + [(name, "eager") for name in EAGER],
)
@torch.no_grad()
def test_every_family_full_short_and_gated(family, attention):
    """Full prompt: the plain model; short prompt: the attached one; gates at their ends: the short prompt again."""
    tiny = build(family, attention)
    if family == "gemma3":  # its window counts what the model reads, which a gate does not shorten
        for layer in tiny.model.get_decoder().layers:
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and 512
        tiny.model.config.text_config.sliding_window = 512
    encoded, reducer = encode(tiny.model, tiny.inputs), create("random")
    whole = run_decoder(tiny.model, tiny.inputs, encoded.features, deepstack=encoded.deepstack)
    real = tiny.inputs["attention_mask"].bool()
    assert float((whole - tiny.model(**tiny.inputs).logits)[real].abs().max()) < 1e-4
    short, logical = compact(tiny.model, tiny.inputs, encoded, reducer, 0.4)
    hard = run_decoder(tiny.model, short)
    with attach(tiny.model, reducer, keep=0.4):
        expected = tiny.model(**tiny.inputs).logits
    index = logical.order[..., None].expand_as(hard)
    assert float((expected.gather(1, index) - hard)[logical.valid].abs().max()) < 1e-4
    bias = [
        torch.full((n,), HIDDEN).index_fill(0, a, 0.0)
        for n, a in zip(encoded.counts, logical.kept_indices, strict=True)
    ]
    soft = run_decoder(tiny.model, tiny.inputs, encoded.features, bias, deepstack=encoded.deepstack)
    assert float((soft.gather(1, index) - hard)[logical.valid].abs().max()) < 1e-4
    assert float((soft - whole)[logical.selected].abs().max()) > 0.1
    at = torch.zeros_like(real)
    at[0, -2:] = True
    some = run_decoder(tiny.model, tiny.inputs, encoded.features, at=at, deepstack=encoded.deepstack)
    assert torch.allclose(some, whole[at], atol=1e-5)


def count_positions(monkeypatch):
    monkeypatch.setattr(running, "positions_of", lambda model, inputs, mask: prompt_positions(mask))


def leave_deepstack(monkeypatch):
    right = VisualOutput.of.__func__
    wrong = classmethod(lambda cls, x, levels: right(cls, x, [[y.flip(0) for y in level] for level in levels]))
    monkeypatch.setattr(VisualOutput, "of", wrong)


@pytest.mark.parametrize("mutate", [count_positions, leave_deepstack], ids=lambda f: f.__name__)
def test_the_comparison_notices(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test_every_family_full_short_and_gated("qwen3_vl", "sdpa")


def test_gradients_reach_deepstack_and_videos():
    for family in ("qwen3_vl", "qwen2_5_vl_video"):
        tiny = build(family)
        encoded = encode(tiny.model, tiny.inputs)
        features = [x.clone().requires_grad_() for x in encoded.features]
        levels = [[x.clone().requires_grad_() for x in level] for level in encoded.deepstack]
        run_decoder(tiny.model, tiny.inputs, features, deepstack=levels)[:, -1].square().sum().backward()
        for x in [*features, *(x for level in levels for x in level)]:
            assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"])
def test_bare_embeddings_are_refused_where_they_are_not_enough(family):
    tiny = build(family)
    with pytest.raises(UserError, match=family):
        embed(tiny.model, tiny.inputs["input_ids"], encode(tiny.model, tiny.inputs).features)


def test_text_only(tiny):
    text = tiny.prepare([None], ["what is"])
    assert torch.allclose(run_decoder(tiny.model, text), tiny.model(**text).logits, atol=1e-5)


@torch.no_grad()
def test_short_prompt_equals_masked_model(tiny, batch, reducer, reference):
    expected = tiny.model(**reference(batch, reducer)).logits
    short, logical = compact(tiny.model, batch, encode(tiny.model, batch, reducer.signals), reducer, 10)
    logits = run_decoder(tiny.model, short)
    index = logical.order[..., None].expand(-1, -1, expected.shape[-1])
    assert float((logits - expected.gather(1, index))[logical.valid].abs().max()) < 1e-4


@torch.no_grad()
def test_one_sample_without_padding_is_not_taken_for_packed_samples(tiny, pictures, uneven, reference):
    single = tiny.prepare([pictures[0]], ["what is here ?"])
    expected = tiny.model(**reference(single, uneven)).logits[:, -1]
    short, _ = compact(tiny.model, single, encode(tiny.model, single), uneven, 10)
    del short["attention_mask"]
    assert float((run_decoder(tiny.model, short)[:, -1] - expected).abs().max()) < 1e-4


def test_the_bias_at_its_ends_equals_the_gathered_stream(tiny, batch, uneven):
    """Soft equals hard: a gate of 0 or 1 on all tokens, and the shortened prompt."""
    encoded = encode(tiny.model, batch)
    short, logical = compact(tiny.model, batch, encoded, uneven, 10)
    hard = run_decoder(tiny.model, short)
    bias, features = [], []
    new = short["mm_encoder_outputs"]["image"].pooler_output
    for x, kept_indices, rows in zip(encoded.features, logical.kept_indices, new, strict=True):
        bias.append(torch.full((36,), HIDDEN).index_fill(0, kept_indices, 0.0))
        features.append(x.index_copy(0, kept_indices, rows.detach()))
    soft = run_decoder(tiny.model, batch, features, key_bias=torch.stack(bias))
    index = logical.order[..., None].expand_as(hard)
    assert float((soft.gather(1, index) - hard).detach()[logical.valid].abs().max()) < 1e-4


def test_gradients_reach_features_and_bias_but_no_weight(tiny, batch):
    features = torch.stack(encode(tiny.model, batch).features).requires_grad_()
    bias = torch.zeros(3, 36, requires_grad=True)
    at = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    at[:, -1] = True
    logits = run_decoder(tiny.model, batch, features, bias, at)
    assert logits.shape == (2, 96)
    assert torch.allclose(logits, tiny.model(**batch).logits[:, -1], atol=1e-4)
    logits.square().sum().backward()
    assert all(bool((x.grad.abs().flatten(1).sum(1) > 0).all()) for x in (features, bias))
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_the_gradient_of_the_bias_is_right(tiny, batch):
    features = encode(tiny.model, batch).features
    bias = torch.zeros(3, 36, requires_grad=True)

    def value(b):
        return run_decoder(tiny.model, batch, features, b)[:, -1].logsumexp(-1).sum()

    value(bias).backward()
    step = torch.zeros(3, 36)
    step[1, 7] = 0.05
    numeric = (value(step) - value(-step)) / 0.1
    assert abs(float(numeric - bias.grad[1, 7])) < 0.02 * float(bias.grad.abs().max()) + 1e-4
