"""The questions of the rendered worlds, by the names that ``data=`` takes."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from lit_reduce.data.jsonl import Row
from lit_reduce.pocket.data import scene_rows
from lit_reduce.pocket.hd import hd_rows
from lit_reduce.pocket.transfer import transfer_rows

SETS: Mapping[str, Callable[[int], Iterator[Row]]] = {
    "pocket": partial(scene_rows, "test"),
    "pocket-val": partial(scene_rows, "val"),
    "pocket-unseen": partial(scene_rows, "unseen"),
    "pocket-transfer": transfer_rows,
    "pocket-hd": partial(hd_rows, "test"),
    "pocket-hd-val": partial(hd_rows, "val"),
}
"""How many -> so many rows. What is chosen by scores is chosen on those that end in -val."""
