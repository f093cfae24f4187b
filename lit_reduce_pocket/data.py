"""Rendered scenes as training groups and as rows to score on."""

from collections.abc import Callable, Iterator
from functools import partial

from PIL import Image

from lit_reduce.data.groups import Group
from lit_reduce.data.jsonl import Row
from lit_reduce_pocket.questions import FAMILIES, ask, questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import Scene, make_scene, scene_rng

WORLD = "world1"  # in cache keys: change it with scenes or questions, then older teacher outputs are not read
Drawing = tuple[Scene, Callable[[], Image.Image]]


def scene_drawing(split: str, index: int) -> Drawing:
    """A scene of pocket and what draws it."""
    scene = make_scene(split, index)
    return scene, partial(render, scene)


def scene_groups(split: str, count: int, turns: int) -> list[Group]:
    """The first ``count`` scenes of a split, each with its questions and answers."""
    return groups_of(scene_drawing, WORLD, split, count, turns)


def scene_rows(split: str, count: int) -> Iterator[Row]:
    """One question a scene, see `rows_of`."""
    return rows_of(scene_drawing, split, count)


def groups_of(scenes: Callable[[str, int], Drawing], world: str, split: str, count: int, turns: int) -> list[Group]:
    """The first ``count`` scenes of a split, each with its questions and answers.

    Args:
        scenes: (split, index) -> a scene and what draws it.
        world: Names the scenes in the keys of the cache.
        split: ``train``, ``val`` or ``test``.
        count: Scenes.
        turns: Questions on each.
    """
    groups = []
    for index in range(count):
        scene, drawn = scenes(split, index)
        asked = tuple((q.prompt, q.answer) for q in questions(scene, turns))
        groups.append(Group(f"{world}-{split}-{index}-{turns}", drawn, asked))
    return groups


def rows_of(scenes: Callable[[str, int], Drawing], split: str, count: int) -> Iterator[Row]:
    """Yields one question a scene, the families in turn.

    Scenes that have no clear question of the family whose turn it is are passed over.
    """
    families, index = list(FAMILIES), 0
    for n in range(count):
        family, question = families[n % len(families)], None
        while question is None:
            scene, drawn = scenes(split, index)
            question = ask(scene, scene_rng(split, index, 5), family)
            index += 1
        yield Row(question.prompt, drawn(), question.answer, family=family, source=f"{split}/{index - 1}")
