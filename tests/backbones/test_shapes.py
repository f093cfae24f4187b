"""Backbones by shape: the published sizes, usable random weights, inputs of any length."""

import pytest
import torch
from families import FAMILIES

from lit_reduce.backbones import load_backbone, shapes
from lit_reduce.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "millions"), [("smolvlm-256m", 256.5), ("llava-1.5-7b", 7063.4), ("qwen2.5-vl-3b", 3754.6)]
)
def test_parameter_counts_are_those_of_the_published_models(name, millions):
    model = shapes.build(shapes.config_of(f"shape:{name}"), torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("family", "visual"), [("llava", 36), ("idefics3", 27), ("qwen2_5_vl", 12)])
def test_a_shape_runs_with_as_many_visual_tokens_as_asked(family, visual):
    config = FAMILIES[family]()[0].config
    model = shapes.build(config, torch.float32, CPU).eval()
    inputs = shapes.example(model, 2, visual, 5)
    assert (inputs["input_ids"] == config.image_token_id).sum(1).tolist() == [visual] * 2
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert out.sequences.shape[1] == visual + 5 + 2
    assert all(x.isfinite().all() and x.std() > 0 for x in out.logits)


def test_tied_weights_stay_tied_and_rotary_tables_are_real():
    config = FAMILIES["llava"]()[0].config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = shapes.build(config, torch.float32, CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_decoder().rotary_emb.inv_freq[0] == 1


@pytest.mark.parametrize(("family", "visual"), [("llava", 35), ("llava", 72), ("idefics3", 10)])
def test_a_count_that_the_geometry_does_not_allow_is_refused(family, visual):
    model = FAMILIES[family]()[0]
    with pytest.raises(UserError, match=f"visual={visual}: a picture has"):
        shapes.example(model, 1, visual, 5)


def test_unknown_shapes_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no backbone has the shape 'huge'; known: shape:smolvlm-256m"):
        load_backbone("shape:huge")


def test_there_is_no_processor_and_it_says_so(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", lambda: FAMILIES["llava"]()[0].config)
    backbone = load_backbone("shape:tiny", device="cpu")
    assert backbone.identity.id == "shape:tiny"
    assert backbone.model.dtype == torch.float32
    assert not any(p.requires_grad for p in backbone.model.parameters())
    with pytest.raises(UserError, match="it is for bench"):
        backbone.prepare([None], ["hello"])
