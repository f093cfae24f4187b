"""CIDEr-D, how much a caption has in common with several references (Vedantam et al., CVPR 2015, arXiv 1411.5726).

Counts of 1- to 4-grams weighed by rarity, clipped cosine, a Gaussian on the difference in length. The numbers are those
of the coco-caption code, whose scale is used: 1.0 there, 100 in tables, is not the largest value.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

N, SIGMA = 4, 6.0
Ngram = tuple[str, ...]


def words(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", caption.lower())


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """The score of each caption, float64 ``[pictures]``; rarity is counted over the references given.

    Args:
        captions: One a picture.
        references: Several a picture.
    """
    counts = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in counts for ngram in set().union(*texts))
    most = math.log(len(captions))
    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        said = _ngrams(caption)
        scores.append(10 * sum(_alike(said, text, frequency, most) for text in texts) / len(texts))
    return torch.tensor(scores, dtype=torch.float64)


def _ngrams(caption: str) -> Counter[Ngram]:
    found = words(caption)
    return Counter(tuple(found[i : i + n]) for n in range(1, N + 1) for i in range(len(found) - n + 1))


def _alike(said: Counter[Ngram], text: Counter[Ngram], frequency: Counter[Ngram], most: float) -> float:
    """The mean over n of the clipped cosine, times the penalty on length (counted in 2-grams, as coco-caption does)."""
    rarity = {ngram: most - math.log(max(1, frequency[ngram])) for ngram in said.keys() | text.keys()}
    dot, left, right, longer = [0.0] * N, [0.0] * N, [0.0] * N, 0
    for ngram, weight in rarity.items():
        n, mine, theirs = len(ngram) - 1, said[ngram] * weight, text[ngram] * weight
        dot[n] += min(mine, theirs) * theirs
        left[n] += mine * mine
        right[n] += theirs * theirs
        longer += (said[ngram] - text[ngram]) * (n == 1)
    cosines = [d / math.sqrt(a * b) if a and b else d for d, a, b in zip(dot, left, right, strict=True)]
    return math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / N
