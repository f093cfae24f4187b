"""Flickr8k: 8,091 photographs with five captions each, and sentences that match a photograph or do not.

For research use; the photographs must not be passed on. A folder that the user names holds

- ``images/``: the photographs, here at 224 x 224 pixels,
- ``captions.txt``: lines ``name,caption`` below a header,
- ``flickr8k.{Train,Dev,Test}Images.txt``: lines ``name TAB sentence TAB match`` or ``no-match``.

The split is by picture, by the digest of its name: 1,000 test, 1,000 val, the rest train. The sentences' own split is
not by picture and is not used.
"""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lit_reduce.errors import UserError
from lit_reduce_smol.packed import Turn

DESCRIBE = "Describe the picture."
ALSO = ("Describe the image.", "What is in the picture?", "Write a caption for this picture.", "What does it show?")
MATCH = "Does this sentence describe the picture? {}"
HELD = 1000  # pictures of test, and of val
SENTENCES = tuple(f"flickr8k.{part}Images.txt" for part in ("Train", "Dev", "Test"))


@dataclass(frozen=True)
class Photo:
    """A photograph.

    Attributes:
        name: The name of its file.
        split: ``train``, ``val`` or ``test``.
        captions: What people wrote about it.
        sentences: (sentence, whether it matches) pairs.
    """

    name: str
    split: str
    captions: tuple[str, ...]
    sentences: tuple[tuple[str, bool], ...]


class Flickr:
    """The photographs in the order of their digests: test, val, train.

    Raises:
        UserError: The folder lacks a file, or a file does not hold what it should.
    """

    name = "flickr8k"

    def __init__(self, folder: Path, held: int = HELD) -> None:
        self.folder = folder
        for name in ("images", "captions.txt", *SENTENCES):
            if not (folder / name).exists():
                raise UserError(f"{folder / name} is missing; docs/smol.md says how to get Flickr8k")
        captions: dict[str, list[str]] = {}
        with (folder / "captions.txt").open(newline="", encoding="utf-8") as file:
            for row in list(csv.reader(file))[1:]:
                if len(row) != 2:
                    raise UserError(f"{folder / 'captions.txt'} holds a line that is not 'name,caption': {row}"[:200])
                captions.setdefault(row[0], []).append(row[1].strip())
        sentences: dict[str, list[tuple[str, bool]]] = {}
        for part in SENTENCES:
            for line in (folder / part).read_text(encoding="utf-8").splitlines():
                name, _, rest = line.partition("\t")
                sentence, _, label = rest.rpartition("\t")
                if label not in ("match", "no-match"):
                    raise UserError(f"{folder / part} holds a line that is not 'name, sentence, match': {line}"[:200])
                sentences.setdefault(name, []).append((sentence, label == "match"))
        self.photos = [
            Photo(name, split_of(place, held), tuple(captions[name]), tuple(sentences.get(name, ())))
            for place, name in enumerate(sorted(captions, key=_digest))
        ]
        self._train = self.indices("train")
        self._held = {caption for photo in self.photos if photo.split != "train" for caption in photo.captions}

    def __len__(self) -> int:
        """The number of photographs."""
        return len(self.photos)

    def indices(self, split: str) -> list[int]:
        """The places of a split's photographs."""
        return [i for i, photo in enumerate(self.photos) if photo.split == split]

    def turns(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """What is asked about a training photograph: its captions, and one sentence that matches and one that does not.

        Sentences that do not match are those of the data set or captions of other training photographs; those written
        about photographs of val and test are left out.
        """
        photo = self.photos[index]
        asked = DESCRIBE if rng.random() < 0.6 else ALSO[rng.integers(len(ALSO))]
        turns: list[Turn] = [(asked, [tidy(caption) for caption in photo.captions])]
        wrong = [s for s, right in photo.sentences if not right and s not in self._held]
        if not wrong or rng.random() < 0.5:
            others = [i for i in self._train if i != index]
            wrong = list(self.photos[others[rng.integers(len(others))]].captions)
        for said, answer in ((photo.captions, "yes"), (wrong, "no")):
            turns.append((MATCH.format(tidy(said[rng.integers(len(said))])), [answer]))
        return turns

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """The data set's own sentences, whether each matches."""
        return [(MATCH.format(tidy(s)), "yes" if right else "no") for s, right in self.photos[index].sentences]

    def open(self, index: int) -> Image.Image:
        """One photograph."""
        return Image.open(self.folder / "images" / self.photos[index].name).convert("RGB")


def split_of(place: int, held: int = HELD) -> str:
    """The split of the photograph whose digest has this place among all."""
    return "test" if place < held else "val" if place < 2 * held else "train"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def tidy(caption: str) -> str:
    """A caption as one writes it: one blank between words, none before the full stop, a capital first."""
    text = " ".join(caption.replace('"', " ").split()).strip(" .,")
    for mark in ",.!?;:'":
        text = text.replace(f" {mark}", mark)
    return text[:1].upper() + text[1:] + "."
