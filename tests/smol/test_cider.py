import pytest
import torch

from lit_reduce_smol.cider import cider_d, words

SAID = ["A brown dog runs through the grass.", "Two men play football on a field.", "A child jumps into the water.",
        "The the the dog dog."]  # fmt: skip
REFERENCES = [
    ["A dog is running in the grass.", "The brown dog runs across a green field.", "A dog outside."],
    ["Men are playing football.", "Two football players on a field with a ball."],
    ["A boy dives into a swimming pool.", "A child jumps into the blue water.", "Somebody swims."],
    ["A dog sleeps on the sofa.", "The dog lies down."],
]
COCO = [1.3018836798967606, 1.655433574295907, 2.544629321630903, 0.6854249938314929]  # pycocoevalcap 1.2, CiderScorer


def test_numbers_of_coco_caption():
    assert cider_d(SAID, REFERENCES).tolist() == pytest.approx(COCO, abs=1e-12)


def test_a_reference_itself_scores_ten_and_strangers_nothing():
    alone = [["one two three four five"], ["six seven eight nine ten"]]
    torch.testing.assert_close(cider_d([a[0] for a in alone], alone), torch.full((2,), 10.0, dtype=torch.float64))
    assert cider_d(["p q r s", "t u v w"], alone).tolist() == [0, 0]


def test_words_know_case_and_punctuation_not():
    assert words("A boy's dog, wet!") == words("a boy's DOG wet") == ["a", "boy's", "dog", "wet"]
