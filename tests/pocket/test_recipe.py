"""The recipe: stages in order, each from where it was, and an export from which training can go on."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from lit_reduce.backbones import identify, load
from lit_reduce.errors import UserError
from lit_reduce.pocket import loop, recipe, tower
from lit_reduce.pocket.comparing import Distances
from lit_reduce.pocket.export import EXTRA, export, start_from
from lit_reduce.pocket.model import build_model
from lit_reduce.pocket.recipe import RecipeSettings, make
from lit_reduce.pocket.render import render
from lit_reduce.pocket.symbols import Symbols
from lit_reduce.pocket.tower import Heads
from lit_reduce.pocket.world import make_scene


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, two windows a batch, and no measuring in between."""
    monkeypatch.setattr(recipe, "fit", partial(loop.fit, every_seconds=0))
    monkeypatch.setattr(recipe, "window_batch", windows)
    monkeypatch.setattr(recipe, "whiten", lambda model: tower.whiten(model, scenes=2))
    monkeypatch.setattr(recipe, "_watch", lambda *_: {})


def windows(step: int, jitter: float = 7.0) -> dict[str, Tensor]:
    return tower.window_batch(step, scenes=1, each=2, jitter=jitter)


def chosen(folder: Path, *stages: str, **settings: object) -> RecipeSettings:
    made = RecipeSettings(output=str(folder), stages=list(stages), device="cpu", workers=0, windows_steps=3)
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def test_a_stage_that_was_killed_ends_as_if_it_had_not_been(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(chosen(tmp_path / "whole", "windows"))
    asked: list[int] = []

    def dies(step: int, jitter: float) -> dict[str, Tensor]:
        asked.append(step)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return windows(step, jitter)

    monkeypatch.setattr(recipe, "window_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        make(chosen(tmp_path / "killed", "windows"))
    make(chosen(tmp_path / "killed", "windows"))
    assert asked == [0, 1, 1, 2]  # no step is lost, none is made twice
    whole, resumed = (torch.load(tmp_path / name / "windows.pt", weights_only=True) for name in ("whole", "killed"))
    assert set(whole["parts"]) == {"tower", "heads"}
    for part, weights in whole["parts"].items():
        assert all(torch.equal(x, resumed["parts"][part][name]) for name, x in weights.items()), part


def test_a_stage_needs_the_one_before_it(small: None, tmp_path: Path) -> None:
    for stage, missing in [
        ("pictures", "windows"),
        ("translate", "pictures"),
        ("connect", "language"),
        ("polish", "connect"),
        ("export", "connect"),
    ]:
        with pytest.raises(UserError, match=rf"{missing}.pt is missing: run the stage {missing} first"):
            make(chosen(tmp_path, stage))
    with pytest.raises(UserError, match=r"stages=\['exprt'\]: use windows"):
        make(chosen(tmp_path, "exprt"))
    assert list(tmp_path.iterdir()) == []


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """What only training needs."""
    vision, text = model.config.vision_config, model.config.text_config
    distances = Distances(text.hidden_size)
    return {"heads": Heads(vision.hidden_size), "symbols": Symbols(model.get_input_embeddings()),
            "distances": distances}  # fmt: skip


@torch.no_grad()
def test_an_export_answers_and_trains_on_alike(tmp_path: Path) -> None:
    model = build_model(1)
    extra = parts_of(model)
    exact = {name: x.clone() for name, x in model.state_dict().items()}
    export(model, extra, tmp_path / "pocket")
    assert EXTRA in {path.name for path in (tmp_path / "pocket").iterdir()}
    names = load_file(tmp_path / "pocket" / "model.safetensors").keys()
    tower = {name for name in names if name.startswith("vision_tower.")}
    assert len(tower) > 90
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert {"language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.weight"} <= set(names)
    backbone = load(tmp_path / "pocket")
    assert backbone.identity.hash == identify(LlavaForConditionalGeneration.from_pretrained(tmp_path / "pocket")).hash
    for name, x in backbone.model.state_dict().items():  # float16 on the disk, float32 in use
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact[name], rtol=2**-11, atol=2**-24)
    other = build_model(0)
    others = parts_of(other)
    start_from(tmp_path / "pocket", other, others)
    inputs = backbone.prepare([render(make_scene("val", 0))], ["is there a cat ?"])
    logits = other.eval()(**inputs).logits
    assert torch.equal(logits, backbone.model(**inputs).logits)
    assert float(np.ptp(logits[0, -1].numpy())) > 0.1  # and they say something
    for part, before in extra.items():
        for name, x in before.state_dict().items():
            assert torch.equal(x.half().float(), others[part].state_dict()[name].float()), name


def test_parts_that_an_older_export_lacks_begin_anew(tmp_path: Path) -> None:
    model = build_model(1)
    extra = parts_of(model)
    new = extra.pop("distances").state_dict()
    export(model, extra, tmp_path / "pocket")
    other = build_model(0)
    others = parts_of(other)
    others["distances"].load_state_dict(new)
    start_from(tmp_path / "pocket", other, others)
    assert all(torch.equal(x, others["distances"].state_dict()[name]) for name, x in new.items())
    assert torch.equal(others["heads"].place.weight, extra["heads"].place.weight.half().float())


def test_pictures_are_shown_in_parts_and_later_whole_but_for_every_third_step() -> None:
    seen = [recipe.lecture(step, whole_from=4)["where"].shape for step in (0, 3, 4, 5, 6)]
    assert seen == [(7, 208), (7, 208), (7, 576), (7, 576), (7, 208)]


def test_the_last_stage_sees_scenes_that_the_one_before_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int | None]] = []
    monkeypatch.setattr(
        recipe, "question_batch", lambda step, scenes, easy, shown=208: asked.append((step, scenes, shown))
    )
    for step in range(3):
        recipe.encore(step, first=60, scenes=32)
    assert asked == [(60, 32, 208), (61, 32, None), (62, 32, None)]


def test_centres_leave_the_middle_of_their_patch_and_every_fourth_batch_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(recipe, "window_batch", lambda step, jitter: asked.append(("windows", jitter)))
    monkeypatch.setattr(recipe, "picture_batch", lambda step, scenes, jitter: asked.append(("pictures", jitter)))
    for step in (0, 100, 400, 703, 5000):
        recipe.glimpse(step, still=100)
    assert asked == [("windows", 1.5), ("windows", 1.5), ("windows", 4.25), ("pictures", 7.0), ("windows", 7.0)]


def test_glimpses_of_both_kinds_have_a_loss() -> None:
    model = build_model(0)
    heads = Heads(model.config.vision_config.hidden_size)
    loss_of = recipe.glimpse_loss(model, heads, torch.device("cpu"))
    parts = loss_of(windows(0), 0)
    whole = loss_of(tower.picture_batch(0, 1), 3)
    assert set(whole) - {"loss", "pictures_whole"} == {f"pictures_{name}" for name in parts}
    assert whole["loss"].item() == whole["pictures_loss"].item()
    assert parts["loss"].item() > 0
