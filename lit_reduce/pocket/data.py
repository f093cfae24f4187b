"""The rendered world as training groups and as rows to score on."""

from collections.abc import Iterator
from functools import partial

from lit_reduce.data.groups import Group
from lit_reduce.data.jsonl import Row
from lit_reduce.pocket.questions import FAMILIES, ask, questions
from lit_reduce.pocket.render import render
from lit_reduce.pocket.world import make_scene, scene_rng

WORLD = 2  # raise when scenes or questions change: cached teacher outputs of older worlds are then left alone


def scene_groups(split: str, count: int, turns: int) -> list[Group]:
    """Returns the first ``count`` scenes of a split, each with its questions and answers."""
    groups = []
    for index in range(count):
        scene = make_scene(split, index)
        asked = tuple((q.prompt, q.answer) for q in questions(scene, turns))
        groups.append(Group(f"world{WORLD}-{split}-{index}-{turns}", partial(render, scene), asked))
    return groups


def scene_rows(split: str, count: int) -> Iterator[Row]:
    """Yields one question a scene, the families in turn.

    Scenes that have no clear question of the family whose turn it is are passed over.
    """
    families, index = list(FAMILIES), 0
    for n in range(count):
        family = families[n % len(families)]
        question = None
        while question is None:
            scene = make_scene(split, index)
            question = ask(scene, scene_rng(split, index, 5), family)
            index += 1
        yield Row(question.prompt, render(scene), question.answer, family=family, source=f"{split}/{index - 1}")
