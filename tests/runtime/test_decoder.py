"""The training path computes what the model computes, and what the gathered stream computes."""

import torch

from lit_reduce.runtime import compact, encode, run_decoder

HIDDEN = torch.finfo(torch.float32).min


def test_full_prompt_equals_forward(tiny, batch):
    encoded = encode(tiny.model, batch)
    assert torch.allclose(run_decoder(tiny.model, batch, encoded.features), tiny.model(**batch).logits, atol=1e-5)


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
    for x, anchors, rows in zip(encoded.features, logical.anchors, new, strict=True):
        bias.append(torch.full((36,), HIDDEN).index_fill(0, anchors, 0.0))
        features.append(x.index_copy(0, anchors, rows.detach()))
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
