"""The measurement of pocket against asking it the questions one by one."""

from collections import defaultdict

import pytest

from lit_reduce.backbones import Backbone, load
from lit_reduce.pocket.quality import SIGHTS, QualitySettings, blind, quality, scene_questions, score, table
from lit_reduce.pocket.questions import FAMILIES
from lit_reduce.settings import BackboneSettings

SCENES, TURNS = 5, 6


@pytest.fixture(scope="module")
def pocket() -> Backbone:
    return load("pocket", "float32", "cpu")


def answer(pocket: Backbone, picture: object, prompt: str) -> str:
    inputs = pocket.prepare([picture], [prompt])
    return pocket.decode(pocket.model.generate(**inputs, do_sample=False, max_new_tokens=24), inputs)[0]


def test_right_answers_are_those_that_generate_gives(pocket: Backbone) -> None:
    expected = defaultdict(list)
    for group, families in scene_questions("val", SCENES, TURNS):
        for (prompt, right), family in zip(group.turns, families, strict=True):
            expected[family].append(float(answer(pocket, group.open(), prompt) == right))
    found = score(pocket, scene_questions("val", SCENES, TURNS))
    assert found == expected
    assert {0.0, 1.0} == {value for values in found.values() for value in values}  # both kinds were there to be told


def test_without_the_picture_it_sees_none(pocket: Backbone) -> None:
    asked = list(scene_questions("val", SCENES, TURNS))
    expected = [float(answer(pocket, None, prompt) == right) for group, _ in asked for prompt, right in group.turns]
    assert blind(pocket, asked, batch=4) == expected
    assert expected != [value for values in score(pocket, asked).values() for value in values]


def test_the_report_adds_up() -> None:
    backbone = BackboneSettings("pocket", "float32", "cpu")
    rows = quality(QualitySettings(backbone, "val", scenes=2, turns=3, easy=0, robust=2, transfer=1))["rows"]
    families = {name: e for name, e in rows.items() if name in FAMILIES}
    others = {"2 scenes " + name for name in SIGHTS} | {"typefaces and backgrounds never seen", "transfer set"}
    assert set(rows) - set(families) == others | {"all families", "without the picture"}
    assert rows["2 scenes as they are"]["questions"] == rows["2 scenes 200 px"]["questions"] == 6
    assert rows["2 scenes as they are"]["accuracy"] == rows["all families"]["accuracy"]
    assert rows["transfer set"]["questions"] == 2
    assert rows["all families"]["questions"] == sum(e["questions"] for e in families.values())
    right = sum(e["questions"] * e["accuracy"] for e in families.values())
    assert rows["all families"]["accuracy"] == pytest.approx(right / rows["all families"]["questions"])
    assert rows["without the picture"]["questions"] == rows["all families"]["questions"]
    assert len(table({"rows": rows}).splitlines()) == 2 + len(rows)
