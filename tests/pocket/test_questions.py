"""Questions: each answer is recomputed from the scene by a reader of sentences that shares no code with the asker."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from lit_reduce_pocket.model import build_tokenizer
from lit_reduce_pocket.questions import FAMILIES, Question, questions
from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import Scene, Thing, make_scene

WHERE: dict[str, Callable[[Thing, Thing], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Question]]:
    scenes = [make_scene("val", index) for index in range(150)]
    return [(scene, question) for scene in scenes for question in questions(scene, 16)]


def only(things: list[Thing]) -> Thing:
    assert len(things) == 1, "the question means one thing"
    return things[0]


def caption(t: Thing) -> str:
    size = "large" if max(t.w, t.h) >= 38 else "small"
    return f"a {size} {t.color} {t.shape}" + (f" with number {t.number}" if t.number is not None else "")


def answer(scene: Scene, prompt: str) -> str:
    """Reads the sentence and looks it up in the scene."""
    shapes = [t for t in scene.things if t.kind == "shape"]
    signs = [t for t in scene.things if t.kind == "sign"]
    bars = [t for t in scene.things if t.kind == "bar"]

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, prompt)

    if m := match(r"what color is the (tallest|shortest) bar \?"):
        order = sorted(bars, key=lambda t: t.h)
        assert order[-1].h - order[-2].h > 8
        assert order[1].h - order[0].h > 8
        return order[-1 if m[1] == "tallest" else 0].color
    if m := match(r"what (color|shape) is the object with number (\d+) \?"):
        return str(getattr(only([t for t in shapes if t.number == m[2]]), m[1]))
    if m := match(r"what color is the sign with the word (\w+) \?"):
        return only([t for t in signs if t.word == m[1]]).color
    if m := match(r"what color is the (\w+) \?"):
        return only([t for t in shapes if t.shape == m[1]]).color
    if m := match(r"what shape is the (\w+) object \?"):
        return only([t for t in shapes if t.color == m[1]]).shape
    if m := match(r"what number is on the (\w+) (\w+) \?"):
        return str(only([t for t in shapes if (t.color, t.shape) == (m[1], m[2])]).number)
    if m := match(r"what word is on the (\w+) sign \?"):
        return str(only([t for t in signs if t.color == m[1]]).word)
    if match(r"how many bars are there \?"):
        return str(len(bars))
    if match(r"how many signs are there \?"):
        return str(len(signs))
    if m := match(r"how many (\w+) objects are there \?"):
        return str(sum(t.color == m[1] for t in shapes))
    if m := match(r"how many (\w+?)s are there \?"):
        return str(sum(t.shape in (m[1], m[1].removesuffix("e")) for t in shapes))
    if m := match(r"is there a sign with the word (\w+) \?"):
        return "yes" if any(t.word == m[1] for t in signs) else "no"
    if m := match(r"is there a (\w+) (\w+) \?"):
        return "yes" if any((t.color, t.shape) == (m[1], m[2]) for t in shapes) else "no"
    if m := match(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?"):
        a = only([t for t in shapes if (t.color, t.shape) == (m[1], m[2])])
        b = only([t for t in shapes if (t.color, t.shape) == (m[4], m[5])])
        gap = WHERE[m[3]](a, b)
        assert abs(gap) >= 28
        return "yes" if gap > 0 else "no"
    if m := match(r"describe the (leftmost|rightmost|highest|lowest) object \."):
        axis, sign = {"leftmost": ("x", 1), "rightmost": ("x", -1), "highest": ("y", 1), "lowest": ("y", -1)}[m[1]]
        order = sorted(shapes, key=lambda t: sign * getattr(t, axis))
        assert sign * (getattr(order[1], axis) - getattr(order[0], axis)) >= 28
        return caption(order[0])
    if m := match(r"describe the (\w+) object \."):
        return caption(only([t for t in shapes if t.color == m[1]]))
    if m := match(r"describe the (\w+) \."):
        return caption(only([t for t in shapes if t.shape == m[1]]))
    raise AssertionError(f"nobody can read: {prompt}")


def test_every_answer_is_what_the_scene_says(asked: list[tuple[Scene, Question]]) -> None:
    kinds = Counter(question.family for _, question in asked)
    assert set(kinds) == set(FAMILIES)
    assert min(kinds.values()) > 60
    for scene, question in asked:
        assert answer(scene, question.prompt) == question.answer, question.prompt


def test_what_a_question_is_about_is_in_the_scene_and_decides(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        assert all(t in scene.things for t in question.about)
        if question.answer not in ("no", "0"):
            assert question.about
            # Without those things the answer is another one, or the question has no meaning any more.
            rest = tuple(t for t in scene.things if t not in question.about)
            poorer = Scene(scene.seed, scene.background, 0, rest, scene.chart)
            try:
                changed = answer(poorer, question.prompt) != question.answer
            except (AssertionError, IndexError):
                changed = True
            assert changed, question.prompt


def test_yes_and_no_are_balanced(asked: list[tuple[Scene, Question]]) -> None:
    for family in ("presence", "relation"):
        said = [question.answer for _, question in asked if question.family == family]
        assert len(said) > 150
        # Four standard deviations of a fair coin.
        assert abs(said.count("yes") - len(said) / 2) < 4 * (len(said) / 4) ** 0.5


def test_answers_cannot_be_guessed_from_the_family(asked: list[tuple[Scene, Question]]) -> None:
    for family in ("attribute", "number", "word", "chart", "count", "caption"):
        said = Counter(question.answer for _, question in asked if question.family == family)
        assert max(said.values()) < 0.45 * said.total(), (family, said.most_common(2))


def test_questions_repeat_and_never_twice_in_a_scene() -> None:
    scene = make_scene("train", 3)
    first = questions(scene, 16)
    assert questions(scene, 16) == first
    assert questions(scene, 16, stream=9) != first
    assert len({question.prompt for question in first}) == len(first) == 16


def test_every_word_is_known(asked: list[tuple[Scene, Question]]) -> None:
    tokenizer, pieces = build_tokenizer(), vocabulary()
    letters = {pieces.index(c) for c in "bcdefghijklmnopqrstuvwxyz"}
    for _, question in asked:
        ids = tokenizer(f"{question.prompt} {question.answer}", add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert not letters & set(ids)  # no word is spelt
