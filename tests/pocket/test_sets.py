import pytest

from lit_reduce.distill.train import WORLDS
from lit_reduce.pocket.data import scene_groups
from lit_reduce.pocket.hd import hd_groups
from lit_reduce.pocket.sets import SETS


@pytest.mark.parametrize("name", [name for name in SETS if name != "pocket-transfer"])
def test_a_set_asks_its_own_split_of_its_own_world(name) -> None:
    split = {"val": "val", "unseen": "unseen"}.get(name.split("-")[-1], "test")
    rows = list(SETS[name](3))
    assert len(rows) == 3
    for row in rows:
        part, index = row.source.split("/")
        assert part == split
        drawn = (hd_groups if "hd" in name else scene_groups)(split, int(index) + 1, 1)[-1].open()
        assert row.open().tobytes() == drawn.tobytes()


def test_every_world_to_train_on_has_questions_to_test_and_to_choose_on() -> None:
    asked = {name for world in WORLDS for name in (world, f"{world}-val")}
    assert asked | {"pocket-unseen", "pocket-transfer"} == set(SETS)
