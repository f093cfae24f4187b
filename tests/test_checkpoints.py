"""What the repository ships: the reference backbone and its plug-in, as a user loads them."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from lit_reduce.backbones import load_backbone
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.plugin import load_plugin
from lit_reduce.reducer import create
from lit_reduce.registry import question_sets
from lit_reduce_pocket.data import scene_rows

POCKET = Path(__file__).parents[1] / "checkpoints" / "pocket"
POCKET_HD = POCKET.with_name("pocket-hd")
PLUGINS = sorted(path.parent.name for path in POCKET.glob("*/reducer_config.json"))


@pytest.fixture(scope="module")
def pocket():
    return load_backbone("pocket")


def test_plain_auto_classes_load_it():
    model = AutoModelForImageTextToText.from_pretrained(POCKET)
    processor = AutoProcessor.from_pretrained(POCKET)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) <= 14_000_000
    assert sum(f.stat().st_size for f in POCKET.glob("*.safetensors")) <= 28_000_000
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.patch_size, model.config.image_seq_length) == (336, 14, 576)
    assert text.num_hidden_layers >= 6
    assert processor.tokenizer.decode(processor.tokenizer("47").input_ids) == "47"


def test_it_sees(pocket):
    """Far above what can be answered without the picture, on test scenes."""
    results = evaluate(pocket, {}, [], list(scene_rows("test", 48)), 24)
    assert results.scores[0].accuracy > 0.8


@pytest.fixture(scope="module")
def chance(pocket):
    """What all tokens give, and 64 at random places."""
    whole, random = evaluate(
        pocket, {"random": ReducerSpec(create("random"))}, [64], list(scene_rows("test", 32)), 16
    ).scores
    return whole.accuracy, random.accuracy


@pytest.mark.parametrize("name", PLUGINS)
def test_every_plug_in_fits_the_backbone_and_beats_chance(pocket, chance, name):
    reducer, config = load_plugin(POCKET / name, backbone=pocket.identity)
    assert config.reducer == name
    assert yaml.safe_load((POCKET / name / "train.yaml").read_text())["reducer"]["name"] == config.reducer
    keep = min(64, max(config.budgets))
    results = evaluate(pocket, {name: ReducerSpec(reducer)}, [keep], list(scene_rows("test", 32)), 16)
    whole, random = chance
    assert results.scores[1].accuracy >= (whole + random) / 2


def test_covipal_is_small_and_keeps_what_matters(pocket):
    reducer, _ = load_plugin(POCKET / "covipal", backbone=pocket.identity)
    share = sum(p.numel() for p in reducer.parameters()) / sum(p.numel() for p in pocket.model.parameters())
    assert share <= 0.05
    results = evaluate(pocket, {"covipal": ReducerSpec(reducer)}, [32], list(scene_rows("test", 48)), 24)
    whole, few = results.scores
    assert few.kept == 32
    assert few.accuracy >= whole.accuracy - 0.15


def test_pocket_hd_reads_what_its_thumbnail_hides():
    """LLaVA-NeXT's layout as plain files, and tiles that are worth their tokens."""
    assert isinstance(AutoModelForImageTextToText.from_pretrained(POCKET_HD), LlavaNextForConditionalGeneration)
    assert sum(f.stat().st_size for f in POCKET_HD.glob("*.safetensors")) <= 28_000_000
    rows = list(question_sets()["pocket-hd"](12))
    whole, thumbnail = evaluate(
        load_backbone("pocket-hd"), {"overview": ReducerSpec(create("overview"))}, [576], rows, 4
    ).scores
    assert thumbnail.kept == 576
    assert whole.accuracy >= thumbnail.accuracy + 0.25


def test_every_plug_in_of_pocket_hd_fits_it_and_says_how_it_was_made():
    identity, found = load_backbone("pocket-hd").identity, sorted(POCKET_HD.glob("*/reducer_config.json"))
    assert found
    for path in found:
        _, config = load_plugin(path.parent, backbone=identity)
        made = yaml.safe_load((path.parent / "train.yaml").read_text())
        assert (config.reducer, made["reducer"]["name"]) == (path.parent.name, path.parent.name)
        assert made["backbone"]["name"] == made["data"]["name"] == "pocket-hd"
