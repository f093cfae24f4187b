"""Which pictures a step learns from: photographs, and from some point on the other sources as well."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_reduce.errors import UserError
from lit_reduce_smol.flickr import Flickr
from lit_reduce_smol.packed import collate, pack
from lit_reduce_smol.projector import averaged
from lit_reduce_smol.sources import EasyVqa, Nlvr, Pocket, Source
from lit_reduce_smol.states import States
from lit_reduce_smol.training import Lesson

NAMES = (Flickr.name, Nlvr.name, EasyVqa.name, Pocket.name)


def open_sources(folder: Path, weights: Mapping[str, float], held: int, scenes: int) -> list[Source]:
    """The sources that have a weight, photographs always and first.

    Raises:
        UserError: An unknown name, or a source's data are missing.
    """
    if wrong := sorted(set(weights) - set(NAMES)):
        raise UserError(f"mix={wrong}: use {', '.join(NAMES)}")
    sources: list[Source] = [Flickr(folder / "flickr8k", held)]
    if weights.get(Nlvr.name):
        sources.append(Nlvr(folder / "nlvr"))
    if weights.get(EasyVqa.name):
        sources.append(EasyVqa())
    if weights.get(Pocket.name):
        sources.append(Pocket(scenes))
    return sources


class Mixture:
    """Steps as a function of the number of pictures seen, so that a killed run goes on as if it had not been.

    Args:
        sources: The first is drawn from alone until ``mix_from`` pictures were seen.
        weights: Name of a source -> how often it is drawn.
        states: Name of a source -> what the tower sees.
        tokenizer: Of the language model.
        seed: Of every draw.
    """

    def __init__(self, sources: Sequence[Source], weights: Mapping[str, float], states: Mapping[str, States],
                 tokenizer: Any, seed: int) -> None:  # fmt: skip
        self.sources, self.states, self.tokenizer, self.seed = sources, states, tokenizer, seed
        shares = np.array([weights.get(source.name, 0.0) for source in sources], float)
        if shares.min() < 0 or shares.sum() <= 0:
            raise UserError(f"mix={dict(weights)}: weights must not be negative, and one must be positive")
        self.shares = shares / shares.sum()
        self.train = {source.name: source.indices("train") for source in sources}

    def lesson(self, seen: int, count: int, side: int, mixed: bool) -> Lesson:
        """The step after ``seen`` pictures: ``count`` more, at ``side`` x ``side`` tokens.

        Args:
            seen: Pictures so far.
            count: Pictures of this step.
            side: Tokens a row and column.
            mixed: Whether other sources, and sentences that match a photograph or do not, take part.
        """
        states, rows = [], []
        for n in range(seen, seen + count):
            rng = np.random.default_rng([self.seed, 3, n])
            source = self.sources[int(rng.choice(len(self.sources), p=self.shares)) if mixed else 0]
            index = self.pick(source.name, n)
            turns = source.turns(index, rng)
            states.append(self.states[source.name][[index]])
            rows.append(pack(turns if mixed else turns[:1], self.tokenizer))
        return Lesson(averaged(torch.cat(states), side), collate(rows), side)

    def pick(self, name: str, n: int) -> int:
        """A training picture: a new order every pass; one whose states are not there yet gives way to the next."""
        train, done = self.train[name], self.states[name].done
        order = np.random.default_rng([self.seed, 4, n // len(train)]).permutation(len(train))
        for k in range(len(train)):
            if done[index := train[order[(n + k) % len(train)]]]:
                return int(index)
        raise UserError(f"no training picture of {name} has been seen by the tower: run the stage states first")
