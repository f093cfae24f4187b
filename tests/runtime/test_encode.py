"""One pass of the tower gives every signal that reducers may declare."""

import pytest
import torch

from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.runtime import encode
from lit_reduce.runtime.encode import prompt_text

ALL = ("cls", "received", "encoder", "text")


def test_features_are_those_of_the_model(tiny, batch):
    expected = tiny.model.get_image_features(batch["pixel_values"]).pooler_output
    for signals in ((), ALL):
        encoded = encode(tiny.model, batch, signals)
        assert all(torch.equal(a, b) for a, b in zip(encoded.features, expected, strict=True))
        assert encoded.samples == [0, 0, 1]
        assert encoded.grids == [(1, 6, 6)] * 3


def test_signals_equal_an_eager_tower(tiny, batch):
    tower = tiny.model.base_model.vision_tower
    encoded = encode(tiny.model, batch, ALL)
    tower.set_attn_implementation("eager")
    out = tower(batch["pixel_values"], output_attentions=True, output_hidden_states=True)
    for i in range(3):
        assert torch.allclose(encoded.signals["cls"][i], out.attentions[-2][i].mean(0)[0, 1:], atol=1e-6)
        assert torch.allclose(encoded.signals["received"][i], out.attentions[-2][i].mean((0, 1))[1:], atol=1e-6)
        assert torch.allclose(encoded.signals["encoder"][i], out.hidden_states[-2][i, 1:], atol=1e-5)


@pytest.mark.parametrize(("layer", "block"), [(-1, 3), (-2, 2), (2, 1), ([-3, -2], 2)])
def test_cls_comes_from_the_block_that_feeds_the_projector(tiny, batch, layer, block):
    tiny.model.config.vision_feature_layer = layer
    tower = tower_of(tiny.model)
    assert tower.attention(tower.feature) is tiny.model.base_model.vision_tower.encoder.layers[block].self_attn
    assert tower.prefix == 1


def test_the_tower_runs_once(tiny, batch):
    calls = []
    tiny.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    encode(tiny.model, batch, ALL)
    assert len(calls) == 1


def test_nothing_is_left_on_the_model(tiny, batch):
    encode(tiny.model, batch, ())
    hooks = [len(m._forward_pre_hooks) for m in tiny.model.modules()]
    configs = [getattr(m, "config", None) for m in tiny.model.modules()]
    encode(tiny.model, batch, ALL)
    assert hooks == [len(m._forward_pre_hooks) for m in tiny.model.modules()]
    assert all(a is getattr(m, "config", None) for a, m in zip(configs, tiny.model.modules(), strict=True))


def test_text_is_the_prompt_without_images_padding_and_answers(tiny, pictures):
    inputs = tiny.prepare([pictures[:2], None], ["what is the red ?", "big w30"])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]  # the word "answer" plays the answer
    text, mask = prompt_text(tiny.model, inputs | {"labels": labels})
    table = tiny.model.get_input_embeddings().weight
    words = [["<s>", "what", "is", "the", "red", "?"], ["<s>", "big", "w30"]]
    for row, expected in enumerate(words):
        ids = tiny.processor.tokenizer.convert_tokens_to_ids(expected)
        assert torch.equal(text[row][mask[row]], table[ids])
        assert mask[row].tolist() == [True] * len(ids) + [False] * (mask.shape[1] - len(ids))
    assert not text[~mask].any()


def test_an_answer_never_reaches_a_reducer(tiny, batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = 7
    other = batch["input_ids"].clone()
    other[:, -2:] = torch.tensor([[50, 51], [52, 53]])
    seen = [
        encode(tiny.model, batch | {"input_ids": ids, "labels": labels}, ALL).tokens([0, 2], ALL)
        for ids in (batch["input_ids"], other)
    ]
    assert all(torch.equal(seen[0].signals[name], seen[1].signals[name]) for name in seen[0].signals)
    assert set(seen[0].signals) == {"cls", "received", "encoder", "text", "text_mask"}


def test_a_reducer_sees_only_what_it_declared(tiny, batch):
    encoded = encode(tiny.model, batch, ALL)
    assert set(encoded.tokens([0], {"cls"}).signals) == {"cls"}
    assert encoded.tokens([2, 0], set()).features.shape == (2, 36, 32)


def test_text_of_each_image_is_that_of_its_own_prompt(tiny, batch):
    encoded = encode(tiny.model, batch, {"text"})
    tokens = encoded.tokens([0, 1, 2], {"text"})
    assert torch.equal(tokens.signals["text"][0], tokens.signals["text"][1])
    assert tokens.signals["text_mask"].sum(1).tolist() == [9, 9, 5]


def test_what_cannot_be_given_is_refused(tiny, batch):
    with pytest.raises(UserError, match="'depth'"):
        encode(tiny.model, batch, {"depth"})
    with pytest.raises(UserError, match=r"108 image tokens.* 72"):
        encode(tiny.model, batch | {"pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(UserError, match="outside of the 4 layers"):
        encode(tiny.model, batch, {"keys@4"})
    with pytest.raises(UserError, match="names no layer"):
        encode(tiny.model, batch, {"keys@last"})
    with pytest.raises(UserError, match="'text_rows'"):  # only the language model has it
        encode(tiny.model, batch, {"text_rows"})
