"""The identity of a backbone follows its weights, not how they are stored or loaded."""

import copy

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lit_reduce.backbones import fingerprint, identify
from lit_reduce_pocket.export import share_weights


def test_facts(tiny):
    identity = tiny.identity
    assert (identity.family, identity.hidden_size, identity.vision_hidden_size, identity.tokens) == (
        "llava",
        32,
        24,
        36,
    )
    assert len(identity.hash) == 64


def test_the_same_in_memory_on_disk_and_in_any_dtype(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "whole")
    tiny.model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = LlavaForConditionalGeneration.from_pretrained(tmp_path / folder, dtype=dtype)
            found = identify(model)
            assert found.hash == tiny.identity.hash
            assert found.id == folder
    assert fingerprint(tiny.model.bfloat16().state_dict().values()) == tiny.identity.hash


def test_names_of_tensors_do_not_matter(tiny, tmp_path):
    """They change between releases of transformers."""
    tiny.model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"old.{name}": x for name, x in load_file(path).items()}, path)
    assert fingerprint(load_file(path).values()) == tiny.identity.hash


def test_one_changed_weight_is_another_backbone(tiny):
    weights = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    for name in ("lm_head.weight", "model.multi_modal_projector.linear_1.bias"):
        changed = copy.deepcopy(weights)
        changed[name].view(-1)[-1] += 0.5
        assert fingerprint(changed.values()) != tiny.identity.hash
    assert fingerprint(reversed(weights.values())) == tiny.identity.hash


def test_shapes_count(tiny):
    assert fingerprint([torch.zeros(2, 3)]) != fingerprint([torch.zeros(3, 2)])


def test_computed_once(tiny, monkeypatch):
    monkeypatch.setattr("lit_reduce.backbones.identity.fingerprint", None)
    assert identify(tiny.model) is tiny.identity


def test_an_index_may_take_tensors_from_another_model(tiny, tmp_path):
    """A model that shares frozen weights with one beside it stores them once."""
    tiny.model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for weight in other.get_decoder().parameters():
            weight.add_(torch.randn_like(weight))
    other.save_pretrained(tmp_path / "other")
    whole = identify(LlavaForConditionalGeneration.from_pretrained(tmp_path / "other")).hash
    size = (tmp_path / "other" / "model.safetensors").stat().st_size
    share_weights(tmp_path / "other", tmp_path / "base")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "other")
    for name, x in other.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert identify(again).hash == whole == fingerprint(again.state_dict().values()) != tiny.identity.hash
    files = list((tmp_path / "other").glob("*.safetensors"))
    assert [path.name for path in files] == ["model-own.safetensors"]
    assert files[0].stat().st_size < 0.8 * size
