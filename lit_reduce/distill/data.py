"""The LightningDataModule of distillation: cached teacher outputs, and batches that depend on the step only."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.teacher import Teacher


class DistillData(LightningDataModule):
    """Serves batches of questions with the teacher's outputs.

    Which questions make the batch of a step depends on the seed and the step alone, so a resumed run goes on with the
    very batch it would have seen, and n processes share the batch that one would have.
    """

    def __init__(
        self,
        teacher: Teacher,
        groups: Sequence[Group],
        val_groups: Sequence[Group],
        *,
        pictures: int = 8,
        turns: int = 4,
        steps: int = 400,
        seed: int = 0,
        val_batch: int = 32,
    ) -> None:
        """Prepare the data.

        Args:
            teacher: Gives the outputs, cached or not.
            groups: Training pictures with their questions.
            val_groups: Validation pictures, disjoint from those.
            pictures: In a step, for each process.
            turns: Questions taken of each picture in a step.
            steps: Of training.
            seed: Of the order.
            val_batch: Questions in a validation batch.
        """
        super().__init__()
        self.held = (teacher,)  # in a tuple: the backbone is no part of this object's state
        self.groups, self.val_groups = groups, val_groups
        self.pictures, self.turns, self.steps, self.seed, self.val_batch = pictures, turns, steps, seed, val_batch

    def prepare_data(self) -> None:
        """Makes the teacher's outputs that are not on disk yet; a killed run goes on from there.

        Each process takes the pictures in an order of its own, so that runs which start together share the work.
        """
        teacher = self.held[0]
        if teacher.cache is not None:
            every = [*self.groups, *self.val_groups]
            random.Random(os.urandom(8)).shuffle(every)
            for group in tqdm(every, desc="teacher", unit="picture"):
                if not (teacher.cache / f"{group.key}.safetensors").is_file():
                    teacher.outputs(group)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Returns the share of one of ``world`` processes in the batch of a step."""
        teacher, count = self.held[0], len(self.groups)
        picked, numbers = [], list[int]()
        for place in range(rank, self.pictures * world, world):
            at = step * self.pictures * world + place
            order = np.random.default_rng([self.seed, 1, at // count]).permutation(count)
            outputs = teacher.outputs(self.groups[order[at % count]])
            n = len(outputs["lengths"])
            rng = np.random.default_rng([self.seed, 2, at])
            turns = rng.permutation(n)[: self.turns].tolist()
            picked.append((outputs, turns))
            numbers += [place * self.turns + i for i in range(len(turns))]
        return make_batch(picked, step, numbers=numbers)

    def train_dataloader(self) -> Any:
        """Batches from the trainer's present step to the last."""
        trainer = self.trainer
        first, rank, world = (trainer.global_step, trainer.global_rank, trainer.world_size) if trainer else (0, 0, 1)
        steps = _Steps(lambda step: self.batch(step, rank, world), first, self.steps)
        return DataLoader(steps, batch_size=None)

    def val_dataloader(self) -> Any:
        """All validation questions in a fixed order; each process takes every world-th batch."""
        teacher = self.held[0]
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        per = max(1, self.val_batch // max(1, *(len(g.turns) for g in self.val_groups)))
        chunks = [self.val_groups[i : i + per] for i in range(0, len(self.val_groups), per)][rank::world]

        def make(i: int) -> Batch:
            outputs = [teacher.outputs(group) for group in chunks[i]]
            return make_batch([(o, range(len(o["lengths"]))) for o in outputs])

        return DataLoader(_Steps(make, 0, len(chunks)), batch_size=None)


class _Steps(IterableDataset[Batch]):
    """Makes items first..last-1 one after another."""

    def __init__(self, make: Callable[[int], Batch], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.last):
            yield self.make(step)
