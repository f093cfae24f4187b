import numpy as np
import pytest

from lit_reduce.errors import UserError
from lit_reduce_smol.flickr import Flickr, tidy


def test_split_is_by_picture_and_stays(flickr8k):
    flickr = Flickr(flickr8k, held=3)
    parts = {split: flickr.indices(split) for split in ("test", "val", "train")}
    assert [len(parts[split]) for split in parts] == [3, 3, 6]
    assert sorted(i for part in parts.values() for i in part) == list(range(12))
    assert [photo.name for photo in Flickr(flickr8k, held=3).photos] == [photo.name for photo in flickr.photos]


def test_every_sentence_finds_its_picture(flickr8k):
    flickr = Flickr(flickr8k, held=3)
    for i, photo in enumerate(flickr.photos):
        assert len(photo.captions) == 5
        assert [right for _, right in photo.sentences] == [True, False]
        assert flickr.open(i).size == (56, 56)


def test_training_says_nothing_that_was_written_about_held_out_pictures(flickr8k):
    header, *rows = (flickr8k / "captions.txt").read_text().splitlines()
    unique = [f"{row.partition(',')[0]},caption number {100 + k}" for k, row in enumerate(rows)]
    (flickr8k / "captions.txt").write_text("\n".join([header, *unique]))
    flickr = Flickr(flickr8k, held=3)
    held = {tidy(c) for photo in flickr.photos if photo.split != "train" for c in photo.captions}
    rng = np.random.default_rng(0)
    for i in flickr.indices("train") * 20:
        describe, yes, no = flickr.turns(i, rng)
        mine = {tidy(c) for c in flickr.photos[i].captions}
        assert set(describe[1]) == mine
        assert (yes[1], no[1]) == (["yes"], ["no"])
        assert any(caption in yes[0] for caption in mine)
        assert not any(caption in no[0] for caption in held | mine)


def test_tidy():
    assert tidy("a man , in  red , jumps .") == "A man, in red, jumps."
    assert tidy("The boy 's dog") == "The boy's dog."


@pytest.mark.parametrize("name", ["images", "captions.txt", "flickr8k.DevImages.txt"])
def test_missing_file(flickr8k, name):
    (flickr8k / name).rename(flickr8k / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is missing"):
        Flickr(flickr8k)


def test_line_without_label(flickr8k):
    (flickr8k / "flickr8k.DevImages.txt").write_text("1.jpg\ta dog\n")
    with pytest.raises(UserError, match="not 'name, sentence, match'"):
        Flickr(flickr8k)
