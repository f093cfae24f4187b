"""pocket-hd: its scenes, its layout against the library's own code, its training against plain inference."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_reduce.backbones import load
from lit_reduce.pocket import hd
from lit_reduce.pocket.model import build_model, normalise
from lit_reduce.pocket.questions import questions
from lit_reduce.pocket.render import render


@pytest.fixture(scope="module")
def model():
    return hd.build_from(build_model()).eval()


def test_a_scene_is_its_four_parts():
    scene, parts = hd.hd_scene("val", 3)
    image = hd.draw(parts)
    assert image.size == (672, 672)
    for number, part in enumerate(parts):
        left, top = 336 * (number % 2), 336 * (number // 2)
        assert image.crop((left, top, left + 336, top + 336)).tobytes() == render(part).tobytes()
        mine = [t for t in scene.things if left <= t.x < left + 336 and top <= t.y < top + 336]
        assert [(round(t.x - left, 6), round(t.y - top, 6), t.color) for t in mine] == [
            (round(t.x, 6), round(t.y, 6), t.color) for t in part.things
        ]
    assert hd.hd_scene("val", 3)[0] == scene
    assert hd.hd_scene("train", 3)[0] != scene


def test_questions_stay_clear_and_print_is_small_on_the_thumbnail():
    families, fonts, counts = Counter(), [], []
    for index in range(60):
        scene, parts = hd.hd_scene("val", index)
        for unique in ([t.word for t in scene.signs], [t.color for t in scene.signs]):
            assert len(set(unique)) == len(unique)
        assert sum(part.chart is not None for part in parts) <= 1
        assert bool(scene.bars) == (scene.chart is not None)
        fonts += [t.font_size / 2 for t in scene.things if t.number or t.word]
        counts.append(len(scene.shapes))
        families.update(q.family for q in questions(scene, 16))
    assert 16 / 2 <= min(fonts) <= max(fonts) <= 34 / 2
    assert 5 < np.mean(counts) < 15
    assert min(families.values()) > 20, families


def test_the_layout_is_the_librarys():
    numbers = torch.arange(hd.NEWLINE, dtype=torch.float32).view(hd.VIEWS, 576, 1)
    base = hd.build_from(build_model()).model
    newline = torch.tensor([float(hd.NEWLINE)])
    packed, lengths = base.pack_image_features([numbers], torch.tensor([[672, 672]]), "default", newline)
    assert torch.equal(packed[0][:, 0].long(), hd.layout())
    assert lengths.tolist() == [hd.PLACES] == [2928]


def test_tiles_are_pictures_of_pocket():
    _, parts = hd.hd_scene("val", 1)
    views = hd.build_images()(hd.draw(parts), return_tensors="pt")["pixel_values"][0]
    own = normalise(torch.stack([torch.from_numpy(np.asarray(render(part)).copy()) for part in parts]))
    torch.testing.assert_close(views[1:].float(), own, atol=1e-4, rtol=0)


@torch.no_grad()
def test_training_sees_what_inference_sees(model):
    """All places shown: the packed turns' logits are those of the model itself, one question at a time."""
    batch = hd.hd_batch(0, 1, None)
    logits, targets = hd.hd_logits(model, batch)
    processor = hd.build_processor()
    scene, parts = hd.hd_scene("train", 0)
    asked = questions(scene, hd.TURNS)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=hd.draw(parts), return_tensors="pt", add_special_tokens=False)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == hd.PLACES
    whole = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits[0], whole, atol=2e-3, rtol=0)
    assert processor.tokenizer.decode(targets[:1]).strip() == asked.answer.split()[0][: len(asked.answer)]


def test_some_places_are_shown_the_telling_ones_first():
    batch = hd.hd_batch(5, 2, 100)
    assert batch["views"].shape == (2, 5, 3, 336, 336)
    assert batch["where"].shape == (2, 100)
    assert (batch["where"].diff(dim=1) > 0).all()
    assert (hd.layout()[batch["where"]] == hd.NEWLINE).any()


def test_it_trains_resumes_and_exports(tmp_path: Path, monkeypatch):
    pocket = tmp_path / "pocket"
    build_model().save_pretrained(pocket)
    chosen = hd.HdSettings(str(tmp_path / "out"), str(pocket), "cpu", scenes=1, shown=64, steps=1, whole_from=9)
    hd.make(chosen)
    first = torch.load(tmp_path / "out" / "hd.pt", weights_only=True)
    steps = []
    right = hd.lecture
    monkeypatch.setattr(hd, "lecture", lambda step, **kwargs: steps.append(step) or right(step, **kwargs))
    chosen.steps = 2
    hd.make(chosen)
    assert steps == [1]
    assert first["step"] == 1
    folder = tmp_path / "out" / "pocket-hd"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 28e6
    backbone = load(folder)
    assert backbone.identity.family == "llava_next"
    assert backbone.model.model.image_newline.abs().max() > 0, "the newline has learned"
    before = build_model().model.vision_tower.state_dict()
    after = backbone.model.model.vision_tower.state_dict()
    assert all(torch.equal(before[name].half().float(), x) for name, x in after.items()), "the tower stays"
