"""The public data set: its own test split stays apart, and pictures keep their own questions."""

from collections import Counter

import numpy as np
import pytest

easy_vqa = pytest.importorskip("easy_vqa")

from lit_reduce_pocket.easy import VAL, easy_image, easy_picture, easy_rows  # noqa: E402


def test_the_splits_are_disjoint_and_complete() -> None:
    files = {split: [path for path, _ in easy_rows(split)] for split in ("train", "val", "test")}
    everything = [path for paths in files.values() for path in paths]
    assert len(set(everything)) == len(everything)
    assert set(files["test"]) == set(easy_vqa.get_test_image_paths().values())
    assert set(files["train"]) | set(files["val"]) == set(easy_vqa.get_train_image_paths().values())
    assert len(files["val"]) == VAL


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_is_with_its_picture(split: str) -> None:
    """Against the package's own lists, read the other way round: from questions to pictures."""
    asked, answers, pictures = easy_vqa.get_test_questions() if split == "test" else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()
    triples = zip(asked, answers, pictures, strict=True)
    expected = Counter((paths[p], q.removesuffix("?"), a) for q, a, p in triples)
    found = Counter(
        (path, q.removesuffix(" ?"), a)
        for part in (("test",) if split == "test" else ("train", "val"))
        for path, turns in easy_rows(part)
        for q, a in turns
    )
    assert found == expected


def test_a_training_picture_comes_from_the_training_split() -> None:
    rows = dict(easy_rows("train"))
    seen = set()
    for index in range(5):
        picture, asked, labels, whole = easy_picture(index, turns=4)
        owners = [path for path, turns in rows.items() if set(asked) <= set(turns)]
        path = next(path for path in owners if np.array_equal(easy_image(path), picture))
        assert len(asked) == len(set(asked)) == min(4, len(rows[path]))
        assert picture.shape == (336, 336, 3)
        assert not whole.any()
        assert not any(values.any() for values in labels.values())
        seen.add(path)
    assert len(seen) == 5
    again = easy_picture(4, turns=4)
    assert (again[0] == picture).all()
    assert again[1] == asked
