"""The identity of a backbone follows its weights, not how they are stored or loaded."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lit_reduce.backbones import fingerprint, identify, identity
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


@pytest.fixture
def loaded(tiny, tmp_path):
    """The tiny model, from a folder, with larger tensors than a look at both their ends covers."""
    tiny.model.save_pretrained(tmp_path / "tiny")
    return LlavaForConditionalGeneration.from_pretrained(tmp_path / "tiny")


def swap(one, other):
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


CHANGES = {
    "noise": lambda m: [w.mul_(1 + torch.randn_like(w) / 2) for w in m.get_decoder().layers[2].parameters()],
    "one projection": lambda m: m.get_decoder().layers[2].self_attn.v_proj.weight.mul_(1.1),
    "layers swapped": lambda m: [
        swap(a, b) for a, b in zip(*(m.get_decoder().layers[i].parameters() for i in (1, 4)), strict=True)
    ],
    "queries and keys swapped": lambda m: swap(*(getattr(vision(m).self_attn, f"{x}_proj").weight for x in "qk")),
    "the middle zeroed": lambda m: [w.view(-1)[len(w.view(-1)) // 4 : -len(w.view(-1)) // 4].zero_() for w in large(m)],
}


def vision(model):
    return next(module for name, module in model.named_modules() if name.endswith("encoder.layers.0"))


def large(model):
    return [weight for weight in model.parameters() if weight.numel() > 400]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_in_memory_is_another_backbone(loaded, change, monkeypatch):
    monkeypatch.setattr(identity, "HEAD", 16)  # as little as of a large tensor
    known = identify(loaded)
    with torch.no_grad():
        CHANGES[change](loaded)
    changed = identify(loaded)
    assert changed.id == known.id
    assert changed.hash != known.hash
    identity._KNOWN.pop(loaded)  # a model that nobody looked at before
    assert identify(loaded).hash == changed.hash


def test_a_stale_file_beside_shards_changes_nothing(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path, max_shard_size="40KB")
    save_file({"old": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    assert identify(LlavaForConditionalGeneration.from_pretrained(tmp_path)).hash == tiny.identity.hash


@pytest.mark.parametrize("way", [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)])
def test_casting_on_from_another_format_stays_the_same(tiny, tmp_path, way):
    tiny.model.save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=way[0]).to(way[1])
    assert identify(model).hash == tiny.identity.hash
