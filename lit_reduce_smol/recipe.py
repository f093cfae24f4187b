"""Trains smol: ``python -m lit_reduce_smol.recipe data=FOLDER``; killed, it goes on when started again.

1. ``states``: what the frozen tower sees in every picture, once.
2. ``words``: a cheap start of the projector; each visual token learns to say words of the captions.
3. ``read``: projector and low-rank updates of the language model learn to answer, at a constant rate: first captions
   from few averaged tokens, then all questions, from more tokens, at last from all. May be prolonged at any time:
   raise the last number of ``until``.
4. ``cool``: a branch of 3 whose rate goes to zero, and ``OUTPUT/export``, what is shipped. 3 is left as it was.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from lit_reduce.console import run
from lit_reduce.errors import UserError
from lit_reduce.files import atomic_path, check_writable
from lit_reduce.settings import configs_dir, resolve
from lit_reduce_pocket.recipe import keep_memory
from lit_reduce_smol.assemble import LAYERS, SIDE, load_parts, make_processor, resample
from lit_reduce_smol.flickr import DESCRIBE, HELD, Flickr, tidy
from lit_reduce_smol.mixture import Mixture, open_sources
from lit_reduce_smol.packed import collate, pack
from lit_reduce_smol.projector import Projector, averaged
from lit_reduce_smol.reader import Reader
from lit_reduce_smol.states import States, look
from lit_reduce_smol.training import Lesson, Training, load_trained, save_trained
from lit_reduce_smol.words import Start, start

STAGES = ("states", "words", "read", "cool")
WATCHED = 32  # photographs of val whose loss is logged
AT_LEAST_1 = ("batch", "held", "threads", "scenes", "words_passes", "words_batch", "cool_pictures")


@dataclass
class RecipeSettings:
    """Settings of the recipe; configs/smol.yaml explains each."""

    data: str = "outputs/smol/data"
    output: str = "outputs/smol"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    start: str | None = None
    seed: int = 0
    threads: int = 1
    held: int = HELD
    scenes: int = 4000
    words_passes: int = 6
    words_side: int = 8
    words_batch: int = 32
    words_rate: float = 1e-3
    words_dropout: float = 0.1
    sides: list[int] = field(default_factory=lambda: [4, 8, 16])
    until: list[int] = field(default_factory=lambda: [3000, 12000, 24000])
    mix: dict[str, float] = field(
        default_factory=lambda: {"flickr8k": 0.7, "easy-vqa": 0.1, "pocket": 0.1, "nlvr1": 0.1}
    )
    mix_from: int = 3000
    batch: int = 4
    projector_rate: float = 1e-3
    update_rate: float = 4e-4
    cool_pictures: int = 2400
    seconds: float = 180.0


class Recipe:
    """The stages over one set of settings."""

    def __init__(self, chosen: RecipeSettings) -> None:
        self.chosen, self.folder = chosen, Path(chosen.output)
        self.sides = _phases(chosen.sides, chosen.until)
        if wrong := [s for s in chosen.stages if s not in STAGES]:
            raise UserError(f"stages={wrong}: use {', '.join(STAGES)}")
        for name in AT_LEAST_1:
            if getattr(chosen, name) < 1:
                raise UserError(f"{name}={getattr(chosen, name)}: give at least 1")
        check_writable(self.folder / "trunk.pt")
        self.sources = open_sources(Path(chosen.data), chosen.mix, chosen.held, chosen.scenes)
        self.flickr = self.sources[0]
        assert isinstance(self.flickr, Flickr)
        self.photos = self.flickr.photos
        self.processor = make_processor()
        self.language, self.tower = load_parts()
        self.grid, self.channels = SIDE // self.tower.config.patch_size, self.tower.config.hidden_size * len(LAYERS)

    def run(self) -> None:
        """The chosen stages, each from where it was."""
        for stage in self.chosen.stages:
            print(f"stage {stage}", flush=True)
            getattr(self, stage)()

    def states(self) -> None:
        """Stage 1: photographs to train on first, so that the other stages may start beside it."""
        table = self.tower.embeddings.position_embeddings
        table.data = resample(table.data, self.grid)
        for source in self.sources:
            order = [i for split in ("train", "val", "test") for i in source.indices(split)]
            States(self.folder / "states", source.name, len(source), self.grid**2, self.channels, write=True).fill(
                partial(look, self.tower), source.open, order
            )

    def words(self) -> None:
        """Stage 2: writes ``words.pt``."""
        chosen, path = self.chosen, self.folder / "words.pt"
        if path.is_file():
            return
        states, projector = self._states()[self.flickr.name], self._projector()
        usable = [i for i in self.flickr.indices("train") if states.done[i]]
        held = self._held(states, 64)

        def see(places: Sequence[int]) -> torch.Tensor:
            return averaged(states[[usable[i] for i in places]], chosen.words_side)

        start(projector, see, [self.photos[i].captions for i in usable],
              (averaged(states[held], chosen.words_side), [self.photos[i].captions for i in held]),
              self.processor.tokenizer, self.language.model.embed_tokens.weight.detach(),
              Start(chosen.words_passes, chosen.words_batch, chosen.words_rate, chosen.words_dropout, chosen.seed),
        )  # fmt: skip
        with atomic_path(path) as temporary:
            torch.save(projector.state_dict(), temporary)

    def read(self) -> None:
        """Stage 3: goes on with ``trunk.pt``."""
        training, path = self._training(), self.folder / "trunk.pt"
        if path.is_file():
            training.load(path)
        elif self.chosen.start:
            load_trained(Path(self.chosen.start), training)
        elif (first := self.folder / "words.pt").is_file():
            training.projector.load_state_dict(torch.load(first, weights_only=True))
        else:
            raise UserError(f"{first} is missing: run the stage words first")
        states = self._states()
        training.run(self.sides[-1][1], self._lessons(states), path, seconds=self.chosen.seconds,
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
        training.run(first + length, self._lessons(states), path, seconds=self.chosen.seconds,
                     factor=lambda seen: max(0.0, 1 - (seen - first) / length),
                     watch=partial(self._watch, training, states))  # fmt: skip
        save_trained(self.folder / "export", training, asdict(self.chosen))

    def _projector(self) -> Projector:
        torch.manual_seed(self.chosen.seed)
        return Projector(self.channels, self.language.config.hidden_size)

    def _states(self) -> dict[str, States]:
        folder, shape = self.folder / "states", (self.grid**2, self.channels)
        return {source.name: States(folder, source.name, len(source), *shape) for source in self.sources}

    def _training(self) -> Training:
        reader = Reader(self.language, self.processor.tokenizer, self.chosen.seed)
        return Training(reader, self._projector(), (self.chosen.projector_rate, self.chosen.update_rate))

    def _lessons(self, states: dict[str, States]) -> Callable[[int], Lesson]:
        chosen = self.chosen
        mixture = Mixture(self.sources, chosen.mix, states, self.processor.tokenizer, chosen.seed)

        def lesson(seen: int) -> Lesson:
            side = next((side for side, until in self.sides if seen < until), self.sides[-1][0])
            return mixture.lesson(seen, chosen.batch, side, seen >= chosen.mix_from)

        return lesson

    def _held(self, states: States, count: int) -> list[int]:
        return [i for i in self.flickr.indices("val") if states.done[i]][:count]

    @torch.no_grad()
    def _watch(self, training: Training, states: dict[str, States], side: int) -> dict[str, float]:
        """The loss a token of captions of val."""
        seen = states[self.flickr.name]
        held, total, count = self._held(seen, WATCHED), 0.0, 0
        for first in range(0, len(held), self.chosen.batch):
            some = held[first : first + self.chosen.batch]
            turns = [[(DESCRIBE, [tidy(c) for c in self.photos[i].captions])] for i in some]
            batch = collate([pack(t, self.processor.tokenizer) for t in turns])
            losses = training.reader(training.projector(averaged(seen[some], side)), batch)
            total, count = total + float(losses.sum()), count + len(losses)
        return {"val": total / max(1, count)}


def _phases(sides: Sequence[int], until: Sequence[int]) -> list[tuple[int, int]]:
    """(side, pictures seen at its end) of each phase."""
    if len(sides) != len(until) or not sides or not set(sides) <= {1, 2, 4, 8, 16} or sorted(set(until)) != [*until]:
        raise UserError(f"sides={[*sides]} until={[*until]}: give sides of 1, 2, 4, 8 or 16, and rising numbers")
    return list(zip(sides, until, strict=True))


def main(argv: Sequence[str]) -> None:
    """Resolve the settings and run the recipe."""
    chosen = resolve(RecipeSettings, argv, configs_dir(), "smol")
    torch.set_num_threads(chosen.threads)
    keep_memory()
    Recipe(chosen).run()


if __name__ == "__main__":
    sys.exit(run(main))
