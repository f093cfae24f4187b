"""pocket and pocket-hd as the library finds them: through the entry points, by name."""

import pytest

from lit_reduce.backbones import load_backbone
from lit_reduce.plugin import load_plugin
from lit_reduce.registry import default_reference, plugin_folders, question_sets, references
from lit_reduce_pocket.data import scene_groups
from lit_reduce_pocket.hd_world import hd_groups

NAMES = ("pocket", "pocket-hd")
SETS = [f"{name}{end}" for name in NAMES for end in ("", "-val")]


def test_both_are_announced_and_pocket_is_the_default() -> None:
    assert set(NAMES) <= set(references())
    assert default_reference() is references()["pocket"]
    assert set(SETS) <= set(question_sets())


@pytest.mark.parametrize("name", SETS)
def test_a_set_asks_its_own_split_of_its_own_world(name: str) -> None:
    split = "val" if name.endswith("-val") else "test"
    rows = list(question_sets()[name](3))
    assert len(rows) == 3
    for row in rows:
        part, index = row.source.split("/")
        assert part == split
        drawn = (hd_groups if "hd" in name else scene_groups)(split, int(index) + 1, 1)[-1].open()
        assert row.open().tobytes() == drawn.tobytes()


@pytest.mark.parametrize(("name", "groups"), [("pocket", scene_groups), ("pocket-hd", hd_groups)])
def test_a_reference_trains_on_its_own_world(name: str, groups) -> None:  # type: ignore[no-untyped-def]
    made = references()[name].training
    assert made is not None
    (own,), (expected,) = made("train", 1, 2), groups("train", 1, 2)
    assert (own.key, own.turns) == (expected.key, expected.turns)
    assert own.open().tobytes() == expected.open().tobytes()


def test_plug_ins_load_by_the_name_of_their_reference() -> None:
    identity = load_backbone("pocket", device="cpu").identity
    assert load_plugin("pocket/covipal", backbone=identity)[1].reducer == "covipal"
    assert {"pocket/covipal", "pocket/packer", "pocket-hd/falcon"} <= set(plugin_folders())
