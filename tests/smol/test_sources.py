import json
import re

import numpy as np
import pytest
from PIL import Image

from lit_reduce.errors import UserError
from lit_reduce_pocket.easy import easy_rows
from lit_reduce_smol.mixture import Mixture, open_sources
from lit_reduce_smol.sources import EasyVqa, Nlvr, Pocket
from lit_reduce_smol.states import States


@pytest.fixture
def nlvr(tmp_path):
    for part, count in (("dev", 4), ("hidden", 3), ("test", 2)):
        folder = tmp_path / "nlvr" / part / "images" / "0"
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            label = ("true", "false")[i % 2]
            lines.append(json.dumps({"sentence": f"{part} {i}", "label": label, "identifier": f"{i}-0"}))
            for order in range(6):
                Image.new("RGB", (400, 100), (i, order, 0)).save(folder / f"{part}-{i}-0-{order}.png")
        (tmp_path / "nlvr" / part / f"{part}.json").write_text("\n".join(lines))
    return tmp_path / "nlvr"


def test_nlvr_trains_on_hidden_and_dev_alone(nlvr):
    source = Nlvr(nlvr, orders=2, held=1)
    assert [len(source.indices(split)) for split in ("train", "val", "test")] == [2 * (3 + 3), 1, 2]
    asked = [source.turns(i, np.random.default_rng(0))[0] for i in source.indices("train")]
    assert {re.search(r"(dev|hidden|test) (\d)", question)[0] for question, _ in asked} == {
        "hidden 0", "hidden 1", "hidden 2", "dev 1", "dev 2", "dev 3"
    }  # fmt: skip
    assert all(answers == ["no" if question[-1] in "13" else "yes"] for question, answers in asked)
    assert source.open(source.indices("train")[3]).getpixel((0, 0)) == (1, 1, 0)


def test_nlvr_of_another_kind(nlvr):
    (nlvr / "dev" / "dev.json").write_text('{"sentence": "no label"}')
    with pytest.raises(UserError, match=r"dev.json is not NLVR1's"):
        Nlvr(nlvr)
    (nlvr / "dev" / "dev.json").unlink()
    with pytest.raises(UserError, match=r"dev.json is missing"):
        Nlvr(nlvr)


def test_easy_vqa_keeps_its_test_part():
    source, rng = EasyVqa(), np.random.default_rng(0)
    assert {source.rows[i][1] for i in source.indices("test")} == {path for path, _ in easy_rows("test")}
    index = source.indices("train")[5]
    known = {(question, (answer,)) for question, answer in source.rows[index][2]}
    assert {(question, tuple(answers)) for question, answers in source.turns(index, rng)} <= known


def test_pocket_scenes_are_functions_of_split_and_index():
    source = Pocket(20)
    assert [len(source.indices(split)) for split in ("train", "val", "test")] == [20, 2, 2]
    first, again = (source.turns(3, np.random.default_rng(1)) for _ in range(2))
    assert first == again
    assert np.array_equal(np.asarray(source.open(3)), np.asarray(Pocket(20).open(3)))


@pytest.fixture
def mixture(flickr8k, tmp_path, tokenizer):
    weights = {"flickr8k": 3.0, "pocket": 1.0}
    sources = open_sources(flickr8k.parent, weights, 3, 6)
    states = {source.name: States(tmp_path / "states", source.name, len(source), 16, 2, True) for source in sources}
    for source in sources:
        states[source.name].rows[:] = np.arange(len(source))[:, None, None]
        states[source.name].done[:] = 1
    return Mixture(sources, weights, states, tokenizer, 0)


def test_a_pass_takes_every_training_picture_once(mixture):
    train = mixture.train["flickr8k"]
    passes = [[mixture.pick("flickr8k", n) for n in range(first, first + 6)] for first in (0, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(train)
    assert passes[0] != passes[1]
    mixture.states["flickr8k"].done[train[0]] = 0
    assert train[0] not in {mixture.pick("flickr8k", n) for n in range(12)}
    mixture.states["flickr8k"].done[:] = 0
    with pytest.raises(UserError, match="run the stage states first"):
        mixture.pick("flickr8k", 0)


def test_captions_alone_until_all_take_part(mixture, tokenizer):
    early = mixture.lesson(0, 4, 2, mixed=False)
    assert early.states.shape == (4, 4, 2)
    assert "sentence" not in tokenizer.decode(early.batch.ids.flatten())
    late = mixture.lesson(40, 40, 4, mixed=True)
    text = tokenizer.batch_decode(late.batch.ids)
    photographs = sum("Does this sentence" in row for row in text)
    assert 20 <= photographs <= 38
    assert late.states.shape == (40, 16, 2)


def test_unknown_source(flickr8k):
    with pytest.raises(UserError, match=r"mix=.*coco"):
        open_sources(flickr8k.parent, {"coco": 1.0}, 3, 6)
