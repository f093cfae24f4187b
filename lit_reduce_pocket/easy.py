"""The public easy-VQA data set (package easy-vqa): a shape a picture, its own train/test split, enlarged to 336 px."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np
from PIL import Image

from lit_reduce.errors import UserError
from lit_reduce_pocket.labels import FIELDS
from lit_reduce_pocket.tower import WHOLE
from lit_reduce_pocket.world import GRID, SIZE

Turn = tuple[str, str]
VAL = 400  # the last so many training pictures are kept for validation


@lru_cache(maxsize=2)
def easy_rows(split: str) -> list[tuple[str, list[Turn]]]:
    """Returns (picture file, turns) of every picture of "train", "val" or "test".

    Raises:
        UserError: If the package easy-vqa is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("the easy-VQA data set is missing: pip install 'lit-reduce[pocket]'") from error
    test = split == "test"
    asked, answers, pictures = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    files = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    turns: dict[int, list[Turn]] = defaultdict(list)
    for question, answer, picture in zip(asked, answers, pictures, strict=True):
        turns[picture].append((question.replace("?", " ?"), answer))
    rows = [(files[i], turns[i]) for i in sorted(turns)]
    return rows if test else rows[:-VAL] if split == "train" else rows[-VAL:]


def easy_image(path: str) -> Image.Image:
    """Opens a picture of the data set at pocket's size."""
    return Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def easy_picture(index: int, turns: int) -> tuple[np.ndarray, list[Turn], dict[str, np.ndarray], np.ndarray]:
    """Returns a training picture with its turns, in the shape of a scene's row; its dense labels are all zero."""
    rows = easy_rows("train")
    path, asked = rows[(index * 7919) % len(rows)]
    rng = np.random.default_rng([11, index])
    asked = [asked[i] for i in rng.permutation(len(asked))[:turns]]
    nothing = {field: np.zeros(GRID * GRID, np.int64) for field in FIELDS}
    return np.asarray(easy_image(path)), asked, nothing, np.zeros(WHOLE, np.float32)
