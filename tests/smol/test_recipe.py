import json
from dataclasses import replace

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce_smol import recipe
from lit_reduce_smol.assemble import read_trained
from lit_reduce_smol.recipe import Recipe, RecipeSettings
from lit_reduce_smol.training import Training


@pytest.fixture
def chosen(flickr8k, tmp_path, monkeypatch, language, tower, tokenizer):
    """A recipe of seconds on the stand-ins."""

    class Processor:
        pass

    Processor.tokenizer = tokenizer
    monkeypatch.setattr(recipe, "load_parts", lambda: (language, tower))
    monkeypatch.setattr(recipe, "make_processor", Processor)
    return RecipeSettings(
        data=str(flickr8k.parent), output=str(tmp_path / "out"), words_passes=2, words_batch=3, sides=[4, 16],
        until=[4, 8], mix={"flickr8k": 1.0, "pocket": 1.0}, mix_from=4, scenes=6, batch=2, cool_pictures=4, seconds=0.0,
        held=3,
    )  # fmt: skip


def trained(folder):
    return read_trained(folder / "export")


def test_all_stages_and_prolonging(chosen, tmp_path, capsys):
    Recipe(chosen).run()
    first = trained(tmp_path / "out")
    assert json.loads((tmp_path / "out/export/trained.json").read_text())["pictures"] == 12
    assert "seen 8 side 16 loss" in capsys.readouterr().out
    Recipe(replace(chosen, until=[4, 12])).run()
    assert json.loads((tmp_path / "out/export/trained.json").read_text())["pictures"] == 16
    assert any(not torch.equal(first[name], x) for name, x in trained(tmp_path / "out").items())


@pytest.mark.parametrize("at", [3, 5])
def test_killed_and_started_again_is_the_same(chosen, tmp_path, monkeypatch, at):
    Recipe(chosen).run()
    whole, steps = trained(tmp_path / "out"), []
    step = Training.step

    def killed(self, *words):
        steps.append(self.seen)
        if len(steps) == at:
            raise KeyboardInterrupt
        return step(self, *words)

    monkeypatch.setattr(Training, "step", killed)
    again = replace(chosen, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        Recipe(again).run()
    Recipe(again).run()
    assert steps == sorted(steps)
    for name, x in trained(tmp_path / "again").items():
        torch.testing.assert_close(x, whole[name], atol=0, rtol=0)


def test_goes_on_from_an_export(chosen, tmp_path):
    Recipe(chosen).run()
    more = replace(chosen, output=str(tmp_path / "more"), start=str(tmp_path / "out/export"), until=[4, 14],
                   stages=["states", "read"])  # fmt: skip
    Recipe(more).run()
    assert torch.load(tmp_path / "more/trunk.pt", weights_only=True)["seen"] == 14


def test_torn_checkpoint(chosen, tmp_path):
    Recipe(chosen).run()
    (tmp_path / "out/trunk.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot go on from .*trunk\.pt"):
        Recipe(replace(chosen, stages=["cool"])).run()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"stages": ["cool"]}, "run the stage read first"),
    ({"stages": ["read"]}, "run the stage words first"),
    ({"stages": ["words"]}, "run the stage 'states' first"),
])  # fmt: skip
def test_stage_without_its_predecessor(chosen, wrong, message):
    with pytest.raises(UserError, match=message):
        Recipe(replace(chosen, **wrong)).run()


WRONG = [
    {"stages": ["reed"]}, {"sides": [3]}, {"sides": [4]}, {"until": [8, 4]}, {"data": "nowhere"}, {"batch": 0},
    {"held": 0}, {"mix": {"coco": 1.0}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_settings(chosen, wrong):
    with pytest.raises(UserError, match=next(iter(wrong)) if "data" not in wrong else "is missing"):
        Recipe(replace(chosen, **wrong))
