"""A cheap start of the projector: each visual token may say a word, and the words of the captions should be said.

No language model runs. The cosine of a visual token with a word's embedding, log-sum-exp over the tokens, a bias for
each word; binary cross-entropy against the words of the picture's captions.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_reduce_smol.projector import Projector

COMMON = 15  # captions that a word must stand in


def words_of(caption: str) -> set[str]:
    """The words of a caption in lower case."""
    return set(re.findall(r"[a-z]+", caption.lower()))


def common_words(captions: Sequence[str], least: int = COMMON) -> list[str]:
    """The words that stand in at least so many captions, in the order of the alphabet."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return sorted(word for word, count in counts.items() if count >= least)


def embeddings_of(words: Sequence[str], tokenizer: Any, table: Tensor) -> Tensor:
    """Unit vectors ``[words, width]``: the mean of the embeddings of a word's tokens, as inside a sentence."""
    ids = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
    return nn.functional.normalize(torch.stack([table[i].mean(0) for i in ids]), dim=-1)


def bags(photos: Sequence[Sequence[str]], words: Sequence[str]) -> Tensor:
    """``[photos, words]``: 1 where a word stands in any caption of a photograph."""
    place = {word: i for i, word in enumerate(words)}
    out = torch.zeros(len(photos), len(words))
    for row, captions in enumerate(photos):
        out[row, [place[w] for caption in captions for w in words_of(caption) if w in place]] = 1
    return out


class BagOfWords(nn.Module):
    """The loss of the start; ``scale`` and ``bias`` are thrown away afterwards."""

    words: Tensor
    prior: Tensor

    def __init__(self, words: Tensor, frequency: Tensor, tokens: int) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.scale = nn.Parameter(torch.tensor(16.0))
        self.register_buffer("prior", torch.logit(frequency.clamp(1e-4, 1 - 1e-4)))
        self.bias = nn.Parameter(self.prior - torch.log(torch.tensor(float(tokens))))

    def logits(self, projector: Projector, states: Tensor) -> Tensor:
        """``[B, words]`` of states ``[B, tokens, channels]``."""
        said = nn.functional.normalize(projector(states), dim=-1)
        return torch.logsumexp(self.scale * (said @ self.words.T), 1) + self.bias

    def forward(self, projector: Projector, states: Tensor, bag: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the words, a picture."""
        logits = self.logits(projector, states)
        return nn.functional.binary_cross_entropy_with_logits(logits, bag, reduction="sum") / len(bag)


@dataclass(frozen=True)
class Start:
    """How the start is trained.

    Attributes:
        passes: Over the photographs.
        batch: Photographs a step.
        rate: The highest learning rate.
        dropout: Of the tower's channels.
        seed: Of the order.
    """

    passes: int
    batch: int
    rate: float
    dropout: float
    seed: int


def start(projector: Projector, see: Callable[[Sequence[int]], Tensor], captions: Sequence[Sequence[str]],
          held: tuple[Tensor, Sequence[Sequence[str]]], tokenizer: Any, table: Tensor, how: Start) -> None:  # fmt: skip
    """Train the projector (in place) to say words; logs the loss on held-out photographs and words it says there.

    Args:
        projector: Untrained; its standardisation and the norm of its output are set here.
        see: Places among the photographs -> states ``[B, tokens, channels]``.
        captions: Of each training photograph.
        held: States and captions of photographs that are not trained on.
        tokenizer: Of the language model.
        table: Its word embeddings ``[vocabulary, width]``.
        how: The numbers.
    """
    vocabulary = common_words([caption for some in captions for caption in some])
    targets, truth = bags(captions, vocabulary), bags(held[1], vocabulary)
    first = see(range(min(256, len(captions))))
    projector.standardise(first)
    model = BagOfWords(embeddings_of(vocabulary, tokenizer, table), targets.mean(0), first.shape[1])
    parameters = [*projector.parameters(), *model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.1)
    a_pass = max(1, len(captions) // how.batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=how.passes * a_pass + 1)
    rng = np.random.default_rng([how.seed, 2])
    for number in range(how.passes):
        order = rng.permutation(len(captions))
        for step in range(a_pass):
            some = order[step * how.batch :][: how.batch].tolist()
            optimizer.zero_grad()
            loss = model(projector, nn.functional.dropout(see(some), how.dropout), targets[some])
            loss.backward()
            optimizer.step()
            rate.step()
        with torch.no_grad():
            logits, seen = model.logits(projector, held[0]), float(model(projector, held[0], truth))
        print(f"words pass {number + 1}: loss {float(loss.detach()):.2f}, on val {seen:.2f}", flush=True)
    for row, said in zip((logits - model.prior)[:4], held[1], strict=False):
        print([vocabulary[j] for j in row.topk(min(8, len(vocabulary))).indices], "|", said[0], flush=True)
    projector.match_norm(first, table)
