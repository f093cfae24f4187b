"""A tap reads what eager attention would show, and changes nothing."""

import pytest
import torch

from lit_reduce.runtime.attention.probe import CLS, LAST, AttentionProbe


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_cls_row_equals_eager_and_the_output_stays(tiny, batch, kernel):
    tower, pixels = tiny.model.base_model.vision_tower, batch["pixel_values"]
    tower.set_attn_implementation("eager")
    eager = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation(kernel)
    plain = tower(pixels).last_hidden_state
    for layer, block in enumerate(tower.encoder.layers):
        with AttentionProbe(block.self_attn, CLS) as tap:
            out = tower(pixels).last_hidden_state
        assert torch.equal(out, plain)
        assert tap.rows[0].shape == (3, 2, 1, 37)
        assert torch.allclose(tap.rows[0], eager[layer][:, :, :1], atol=1e-6)


@pytest.mark.parametrize(
    "rows", [LAST, CLS, slice(3, 9), torch.tensor([40, 2, 7])], ids=["last", "first", "some", "list"]
)
@pytest.mark.parametrize("padded", [True, False])
def test_rows_of_a_causal_decoder_with_grouped_heads(tiny, batch, rows, padded):
    model = tiny.model
    inputs = {k: v for k, v in batch.items() if padded or k != "attention_mask"}
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions[2][:, :, rows]
    model.set_attn_implementation("sdpa")
    plain = model(**inputs).logits
    with AttentionProbe(model.get_decoder().layers[2].self_attn, rows) as tap:
        assert torch.equal(model(**inputs).logits, plain)
    real = batch["attention_mask"].bool() if padded else torch.ones_like(batch["input_ids"], dtype=torch.bool)
    asked = real[:, rows][:, None, :, None].expand_as(expected)  # rows of padding are nobody's business
    assert torch.allclose(tap.rows[0][asked], expected[asked], atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
def test_every_sample_may_ask_for_rows_of_its_own(tiny, batch, padded):
    model, rows = tiny.model, torch.tensor([[40, 2, 7], [41, 60, 44]])
    inputs = {k: v for k, v in batch.items() if padded or k != "attention_mask"}
    with AttentionProbe(model.get_decoder().layers[2].self_attn, slice(None)) as whole:
        model(**inputs)
    with AttentionProbe(model.get_decoder().layers[2].self_attn, rows) as tap:
        model(**inputs)
    for row, expected, asked in zip(tap.rows[0], whole.rows[0], rows, strict=True):
        assert torch.allclose(row, expected[:, asked], atol=1e-6)


def test_rows_at_a_decode_step_see_the_cache(tiny, batch):
    model = tiny.model
    with AttentionProbe(model.get_decoder().layers[1].self_attn, LAST) as tap:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    length = batch["input_ids"].shape[1]
    assert [row.shape[-1] for row in tap.rows] == [length, length + 1, length + 2]
    assert all(torch.allclose(row.sum(-1), torch.ones(())) for row in tap.rows)


def test_no_more_than_the_asked_rows_are_computed(tiny, batch, monkeypatch):
    """The whole map of a 577-token tower would cost as much as the attention itself."""
    sizes = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a: sizes.append(x.numel()) or softmax(x, *a))
    with AttentionProbe(tiny.model.base_model.vision_tower.encoder.layers[-2].self_attn, CLS):
        tiny.model.base_model.vision_tower(batch["pixel_values"])
    assert sizes == [3 * 2 * 1 * 37]


def test_the_config_comes_back_after_an_error(tiny):
    block = tiny.model.base_model.vision_tower.encoder.layers[0].self_attn
    config = block.config
    with AttentionProbe(block):
        assert block.config is not config
        assert block.config.hidden_size == config.hidden_size
    assert block.config is config
    with pytest.raises(TypeError), AttentionProbe(block):
        block()
    assert block.config is config
