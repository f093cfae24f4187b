"""Loading a backbone, preparing its inputs and reading its answers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_reduce.backbones import load_backbone, wrap
from lit_reduce.errors import UserError


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "tiny")
    tiny.processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_loads_frozen_and_gives_the_same_answers(tiny, folder, pictures, batch):
    loaded = load_backbone(folder)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    inputs = loaded.prepare([pictures[:2], pictures[2]], ["what is the red w30 here ?", "is big ?"])
    assert all(torch.equal(inputs[name], batch[name]) for name in batch)
    assert torch.equal(loaded.model(**inputs).logits, tiny.model(**batch).logits)
    assert loaded.identity.hash == tiny.identity.hash


def test_dtype_by_name(folder, pictures):
    loaded = load_backbone(folder, dtype="bfloat16", device="cpu")
    inputs = loaded.prepare(pictures[:1], ["what"])
    assert inputs["pixel_values"].dtype == loaded.model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="float33"):
        load_backbone(folder, dtype="float33")


def test_prompts_are_padded_on_the_left_and_hold_their_images(tiny, batch):
    assert batch["attention_mask"].sum(1).tolist() == [81, 41]
    assert (batch["input_ids"] == 3).sum(1).tolist() == [72, 36]
    assert bool((batch["attention_mask"].diff(dim=1) >= 0).all())
    words = tiny.processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][1][batch["attention_mask"][1].bool()])
    assert words == ["<s>", *["<image>"] * 36, "is", "big", "?", "answer"]
    assert batch["pixel_values"].shape == (3, 3, 24, 24)


def test_pictures_of_any_mode(tiny, pictures):
    grey = tiny.prepare([pictures[0].convert("L")], ["what"])["pixel_values"]
    clear = tiny.prepare([pictures[0].convert("RGBA")], ["what"])["pixel_values"]
    assert torch.equal(clear, tiny.prepare([pictures[0]], ["what"])["pixel_values"])
    assert grey.shape == clear.shape


def test_without_a_chat_template(tiny, pictures):
    tiny.processor.chat_template = None
    marked = tiny.prepare([pictures[0]], ["<image> what"])["input_ids"]
    bare = tiny.prepare([pictures[0]], ["what"])["input_ids"]
    assert torch.equal(marked, bare)
    assert tiny.prepare([None], ["what"])["input_ids"].tolist() == [[6]]


def test_a_placeholder_in_the_prompt_is_refused(tiny, pictures):
    with pytest.raises(UserError, match="stands for a picture"):
        tiny.prepare([pictures[0]], ["what is <image> ?"])


def test_answers_are_the_new_tokens_only(tiny, batch):
    tokens = tiny.processor.tokenizer.convert_tokens_to_ids(["red", "big", "</s>", "[PAD]"])
    sequences = torch.cat([batch["input_ids"], torch.tensor([tokens, [*tokens[1:], 0]])], 1)
    assert tiny.decode(sequences, batch) == ["red big", "big"]


def test_what_cannot_be_loaded(tmp_path, folder):
    with pytest.raises(UserError, match="no backbone can be loaded from"):
        load_backbone(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(UserError, match=r"'clip' is not supported: .*families.py.* known: .*llava"):
        load_backbone(tmp_path / "other")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="no backbone can be loaded from"):
        load_backbone(folder)


def test_missing_weights_are_not_invented(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["language_model.lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight.* missing"):
        load_backbone(folder)


@pytest.mark.parametrize("place", ["package/checkpoints", "checkpoints"])
def test_a_reference_is_found_inside_its_package_or_beside_it(folder, tmp_path, monkeypatch, place):
    monkeypatch.setattr("lit_reduce_pocket.reference.PACKAGE", tmp_path / "package")
    with pytest.raises(UserError, match="run from a checkout"):
        load_backbone("pocket")
    shutil.copytree(folder, tmp_path / place / "pocket")
    assert load_backbone("pocket").identity.id == "pocket"


def test_a_folder_comes_before_a_reference_of_the_same_name(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "pocket")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("pocket").identity.hash == load_backbone(folder).identity.hash


def test_wrap_freezes(tiny):
    tiny.model.requires_grad_(True)
    assert not any(weight.requires_grad for weight in wrap(tiny.model, tiny.processor).model.parameters())
