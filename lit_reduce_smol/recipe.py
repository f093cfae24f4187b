"""Trains smol: ``python -m lit_reduce_smol.recipe data=FOLDER``; killed, it goes on when started again.

1. ``states``: what the frozen tower sees in every picture, once.
2. ``words``: a cheap start of the projector; each visual token learns to say words of the captions.
3. ``read``: projector and low-rank updates of the language model learn to answer, at a constant rate: first from few
   averaged tokens, then from all. May be prolonged at any time: raise the last number of ``until``.
4. ``cool``: a branch of 3 whose rate goes to zero, and ``OUTPUT/export``, what is shipped. 3 is left as it was.
"""

import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_reduce.console import run
from lit_reduce.errors import UserError
from lit_reduce.files import atomic_folder, check_writable
from lit_reduce.settings import configs_dir, resolve
from lit_reduce_smol.assemble import load_parts, make_processor, resample
from lit_reduce_smol.flickr import Flickr, tidy
from lit_reduce_smol.packed import collate, pack
from lit_reduce_smol.projector import Projector, averaged
from lit_reduce_smol.reader import Reader
from lit_reduce_smol.states import States, look
from lit_reduce_smol.training import Lesson, Training
from lit_reduce_smol.words import BagOfWords, bags, common_words, embeddings_of, words_of

STAGES = ("states", "words", "read", "cool")
GRID, CHANNELS, PATCHES = 16, 768, 256
WATCHED = 32  # photographs of val whose loss is logged


@dataclass
class RecipeSettings:
    """Settings of the recipe; configs/smol.yaml explains each."""

    data: str = "outputs/smol/data"
    output: str = "outputs/smol"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    start: str | None = None
    seed: int = 0
    threads: int = 1
    photos: int = 0
    words_passes: int = 6
    words_side: int = 8
    words_batch: int = 64
    words_rate: float = 1e-3
    sides: list[int] = field(default_factory=lambda: [4, 8, 16])
    until: list[int] = field(default_factory=lambda: [1500, 8000, 20000])
    sentences_from: int = 1500
    batch: int = 4
    projector_rate: float = 1e-3
    update_rate: float = 4e-4
    cool_pictures: int = 1200
    seconds: float = 180.0


class Recipe:
    """The stages over one set of settings."""

    def __init__(self, chosen: RecipeSettings) -> None:
        self.chosen, self.folder = chosen, Path(chosen.output)
        self.sides = _phases(chosen.sides, chosen.until)
        if wrong := [s for s in chosen.stages if s not in STAGES]:
            raise UserError(f"stages={wrong}: use {', '.join(STAGES)}")
        check_writable(self.folder / "trunk.pt")
        self.flickr = Flickr(Path(chosen.data) / "flickr8k")
        self.processor = make_processor()
        self.language, self.tower = load_parts()
        self.train = self.flickr.indices("train")[: chosen.photos or None]

    def run(self) -> None:
        """The chosen stages, each from where it was."""
        for stage in self.chosen.stages:
            print(f"stage {stage}", flush=True)
            getattr(self, stage)()

    def states(self) -> None:
        """Stage 1."""
        table = self.tower.embeddings.position_embeddings
        table.data = resample(table.data, GRID)
        order = [*self.train, *self.flickr.indices("val"), *self.flickr.indices("test")]
        self._states(write=True).fill(partial(look, self.tower), self.flickr.open, order)

    def words(self) -> None:
        """Stage 2: writes ``words.pt``."""
        chosen, path = self.chosen, self.folder / "words.pt"
        if path.is_file():
            return
        states, rng = self._states(), np.random.default_rng([chosen.seed, 2])
        usable = [i for i in self.train if states.done[i]]
        held = [i for i in self.flickr.indices("val") if states.done[i]][:64]
        captions = [self.flickr.photos[i].captions for i in usable]
        vocabulary = common_words([caption for some in captions for caption in some])
        targets = bags(captions, vocabulary)
        projector = self._projector()
        projector.standardise(states[usable[:256]])
        words = embeddings_of(vocabulary, self.processor.tokenizer, self.language.model.embed_tokens.weight.detach())
        model = BagOfWords(words, targets.mean(0), chosen.words_side**2)
        parameters = [*projector.parameters(), *model.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=chosen.words_rate, weight_decay=0.01)
        steps = chosen.words_passes * (len(usable) // chosen.words_batch)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, chosen.words_rate, total_steps=max(2, steps + 1))
        for step in range(steps):
            place = step % (len(usable) // chosen.words_batch)
            if place == 0:
                order = rng.permutation(len(usable))
            some = order[place * chosen.words_batch :][: chosen.words_batch]
            seen = averaged(states[[usable[i] for i in some]], chosen.words_side)
            optimizer.zero_grad()
            loss = model(projector, seen, targets[some])
            loss.backward()
            optimizer.step()
            rate.step()
            if step % 20 == 0 or step == steps - 1:
                print(f"words {step + 1}/{steps} loss {float(loss.detach()):.2f}", flush=True)
        if held:
            self._show_words(model, projector, averaged(states[held], chosen.words_side), held, vocabulary)
        projector.match_norm(averaged(states[usable[:64]], chosen.words_side), self.language.model.embed_tokens.weight)
        torch.save(projector.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def _show_words(self, model: Any, projector: Projector, states: Tensor, held: list[int], words: list[str]) -> None:
        logits = model.logits(projector, states)
        truth = bags([self.flickr.photos[i].captions for i in held], words)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(held)
        print(f"words on val: loss {float(loss):.2f}")
        for row, i in zip(logits[:6], held, strict=False):
            print([words[j] for j in row.topk(8).indices], "|", self.flickr.photos[i].captions[0], flush=True)

    def read(self) -> None:
        """Stage 3: goes on with ``trunk.pt``."""
        training, path = self._training(), self.folder / "trunk.pt"
        if path.is_file():
            training.load(path)
        elif self.chosen.start:
            load_trained(Path(self.chosen.start), training)
        elif (start := self.folder / "words.pt").is_file():
            training.projector.load_state_dict(torch.load(start, weights_only=True))
        else:
            raise UserError(f"{start} is missing: run the stage words first")
        states = self._states()
        training.run(self.sides[-1][1], partial(self._lesson, states), path, seconds=self.chosen.seconds,
                     watch=partial(self._watch, training, states))  # fmt: skip

    def cool(self) -> None:
        """Stage 4: goes on with ``cool.pt`` where that came from the present ``trunk.pt``; writes the export."""
        training, path, trunk = self._training(), self.folder / "cool.pt", self.folder / "trunk.pt"
        if not trunk.is_file():
            raise UserError(f"{trunk} is missing: run the stage read first")
        training.load(trunk)
        first = training.origin = training.seen
        if path.is_file():
            training.load(path)
            if training.origin != first:
                training.load(trunk)
                training.origin = first
        states, length = self._states(), self.chosen.cool_pictures
        training.run(first + length, partial(self._lesson, states), path, seconds=self.chosen.seconds,
                     factor=lambda seen: max(0.0, 1 - (seen - first) / length),
                     watch=partial(self._watch, training, states))  # fmt: skip
        save_trained(self.folder / "export", training, asdict(self.chosen))

    def _projector(self) -> Projector:
        torch.manual_seed(self.chosen.seed)
        return Projector(CHANNELS, self.language.config.hidden_size)

    def _states(self, write: bool = False) -> States:
        count = len(self.flickr.photos)
        return States(self.folder / "states", "flickr8k", count, PATCHES, CHANNELS, write)

    def _training(self) -> Training:
        reader = Reader(self.language, self.processor.tokenizer, self.chosen.seed)
        return Training(reader, self._projector(), (self.chosen.projector_rate, self.chosen.update_rate))

    def _lesson(self, states: States, seen: int) -> Lesson:
        """The pictures of the step after ``seen``, the same whenever it is asked for."""
        side = next((side for side, until in self.sides if seen < until), self.sides[-1][0])
        picked, rows = [], []
        for n in range(seen, seen + self.chosen.batch):
            index = self._pick(n, states)
            rng = np.random.default_rng([self.chosen.seed, 3, n])
            picked.append(index)
            turns = self.flickr.turns(index, rng, sentences=seen >= self.chosen.sentences_from)
            rows.append(pack(turns, self.processor.tokenizer))
        return Lesson(averaged(states[picked], side), collate(rows), side)

    def _pick(self, n: int, states: States) -> int:
        """The n-th training picture: a new order every pass; one whose states are not there yet gives way to others."""
        size = len(self.train)
        order = np.random.default_rng([self.chosen.seed, 4, n // size]).permutation(size)
        return next(i for k in range(size) if states.done[i := self.train[order[(n + k) % size]]])

    @torch.no_grad()
    def _watch(self, training: Training, states: States, side: int) -> dict[str, float]:
        """The loss a token of captions of val."""
        held = [i for i in self.flickr.indices("val") if states.done[i]][:WATCHED]
        total, count = 0.0, 0
        for start in range(0, len(held), self.chosen.batch):
            some = held[start : start + self.chosen.batch]
            turns = [[("Describe the picture.", [tidy(c) for c in self.flickr.photos[i].captions])] for i in some]
            batch = collate([pack(t, self.processor.tokenizer) for t in turns])
            losses = training.reader(training.projector(averaged(states[some], side)), batch)
            total, count = total + float(losses.sum()), count + len(losses)
        return {"val": total / count}


def save_trained(folder: Path, training: Training, settings: dict[str, Any]) -> None:
    """Write ``trained.safetensors`` (float16; the projector's standardisation in float32) and ``trained.json``."""
    tensors = {f"projector.{k}": x.half() for k, x in training.projector.state_dict().items()}
    tensors |= {f"projector.{k}": getattr(training.projector, k).clone() for k in ("mean", "std")}
    tensors |= {k: x.half().contiguous() for k, x in training.reader.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "trained.safetensors")
        record = {"pictures": training.seen, "settings": settings}
        (temporary / "trained.json").write_text(json.dumps(record, indent=2) + "\n")


def load_trained(folder: Path, training: Training) -> None:
    """Start from what `save_trained` wrote; the optimizer starts anew."""
    tensors = {k: x.float() for k, x in load_file(folder / "trained.safetensors").items()}
    prefix = "projector."
    training.projector.load_state_dict({k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)})
    training.reader.load_state_dict({k: x for k, x in tensors.items() if not k.startswith(prefix)})
    training.seen = int(json.loads((folder / "trained.json").read_text())["pictures"])


def _phases(sides: Sequence[int], until: Sequence[int]) -> list[tuple[int, int]]:
    """(side, pictures seen at its end) of each phase."""
    if len(sides) != len(until) or not sides or not set(sides) <= {1, 2, 4, 8, 16} or sorted(set(until)) != [*until]:
        raise UserError(f"sides={[*sides]} until={[*until]}: give a side of 1, 2, 4, 8 or 16 and a rising number of each")
    return list(zip(sides, until, strict=True))


def keep_memory() -> None:
    """Let glibc reuse freed memory: each step frees and takes large blocks, and page faults cost more."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # not glibc


def main(argv: Sequence[str]) -> None:
    """Resolve the settings and run the recipe."""
    chosen = resolve(RecipeSettings, argv, configs_dir(), "smol")
    torch.set_num_threads(chosen.threads)
    keep_memory()
    Recipe(chosen).run()


if __name__ == "__main__":
    sys.exit(run(main))
