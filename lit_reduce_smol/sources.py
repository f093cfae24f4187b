"""Pictures with questions beside Flickr8k: NLVR1, easy-VQA and pocket's world; each split by picture.

- NLVR1 (Suhr et al., ACL 2017; CC-BY-4.0): is a sentence true of three boxes of shapes? Its training labels are not
  public: ``hidden`` and ``dev`` are trained on, ``test`` is not. The boxes can be put in six orders.
- easy-VQA (package ``easy-vqa``, MIT): one shape a picture.
- pocket's world: rendered here, without end.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from lit_reduce.errors import UserError
from lit_reduce_pocket.easy import easy_rows
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import make_scene
from lit_reduce_smol.packed import Turn

TRUE = "Is this sentence true? {}"
ASKED = 6  # questions a picture of easy-VQA or pocket and step


class Source(Protocol):
    """Pictures that may be trained on.

    Attributes:
        name: What its states are called on disk.
    """

    name: str

    def __len__(self) -> int:
        """The number of pictures of all splits."""
        ...

    def indices(self, split: str) -> list[int]:
        """The places of a split's pictures."""
        ...

    def open(self, index: int) -> Image.Image:
        """One picture."""
        ...

    def turns(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """What is asked about a picture of ``train`` in one step."""
        ...

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """What a picture is measured by: all its questions that have one right answer."""
        ...


class Nlvr:
    """NLVR1 in a folder that holds ``dev``, ``hidden`` and ``test`` as they are published.

    Raises:
        UserError: The folder lacks a file, or a file does not hold what it should.
    """

    name = "nlvr1"

    def __init__(self, folder: Path, orders: int = 2, held: int = 100) -> None:
        self.rows: list[tuple[str, Path, str, str]] = []  # split, picture, sentence, answer
        for part in ("hidden", "dev", "test"):
            file = folder / part / f"{part}.json"
            if not file.is_file():
                raise UserError(f"{file} is missing; docs/smol.md says how to get NLVR1")
            pictures = {path.name: path for path in (folder / part / "images").rglob("*.png")}
            try:
                rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                for place, row in enumerate(rows):
                    split = "test" if part == "test" else "val" if part == "dev" and place < held else "train"
                    for order in range(orders if split == "train" else 1):
                        path = pictures[f"{part}-{row['identifier']}-{order}.png"]
                        answer = {"true": "yes", "false": "no"}[row["label"]]
                        self.rows.append((split, path, row["sentence"].strip(), answer))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} is not NLVR1's: {' '.join(str(error).split())[:100]}") from error

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)

    def indices(self, split: str) -> list[int]:
        """The places of a split's pictures."""
        return [i for i, row in enumerate(self.rows) if row[0] == split]

    def open(self, index: int) -> Image.Image:
        """One picture, 400 x 100."""
        return Image.open(self.rows[index][1]).convert("RGB")

    def turns(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """The one sentence of a picture."""
        return _some(self.pairs(index), rng)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """The one sentence of a picture."""
        _, _, sentence, answer = self.rows[index]
        return [(TRUE.format(sentence), answer)]


class EasyVqa:
    """easy-VQA; the last 400 pictures of its training part are val, as for pocket.

    Raises:
        UserError: The package is not installed.
    """

    name = "easy-vqa"

    def __init__(self) -> None:
        self.rows = [(split, *row) for split in ("train", "val", "test") for row in easy_rows(split)]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)

    def indices(self, split: str) -> list[int]:
        """The places of a split's pictures."""
        return [i for i, row in enumerate(self.rows) if row[0] == split]

    def open(self, index: int) -> Image.Image:
        """One picture, 64 x 64."""
        return Image.open(self.rows[index][1]).convert("RGB")

    def turns(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """Some of a picture's questions."""
        return _some(self.pairs(index), rng)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """All questions of a picture."""
        return self.rows[index][2]


class Pocket:
    """Scenes of pocket's world: of the training split so many, and a tenth as many of val and of test."""

    name = "pocket"

    def __init__(self, scenes: int = 4000) -> None:
        sizes = {"train": scenes, "val": scenes // 10, "test": scenes // 10}
        self.rows = [(split, i) for split, size in sizes.items() for i in range(size)]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)

    def indices(self, split: str) -> list[int]:
        """The places of a split's pictures."""
        return [i for i, row in enumerate(self.rows) if row[0] == split]

    def open(self, index: int) -> Image.Image:
        """One picture, 336 x 336."""
        return render(make_scene(*self.rows[index]))

    def turns(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """Some questions about a scene."""
        return _some(self.pairs(index), rng)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """Questions about a scene."""
        return [(q.prompt, q.answer) for q in questions(make_scene(*self.rows[index]), 2 * ASKED)]


def _some(pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[Turn]:
    return [(pairs[i][0], [pairs[i][1]]) for i in rng.permutation(len(pairs))[:ASKED]]
