"""Draws a test scene and prints what to ask about it: ``python -m lit_reduce_pocket.draw scene.png [number]``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_reduce.console import run
from lit_reduce.errors import UserError
from lit_reduce.files import atomic_path, check_writable
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import make_scene

ASKED = 8  # questions that are printed
USAGE = "python -m lit_reduce_pocket.draw FILE.png [NUMBER]"


def main(argv: Sequence[str]) -> None:
    """Writes the picture and prints a command, then further questions with their answers.

    Raises:
        UserError: Other words than a PNG file and a number, or a file that cannot be written.
    """
    words = list(argv)
    if not 1 <= len(words) <= 2 or Path(words[0]).suffix != ".png" or not all(w.isdecimal() for w in words[1:]):
        raise UserError(f"cannot read {' '.join(words) or 'nothing'}: write {USAGE}")
    path, scene = Path(words[0]), make_scene("test", int(words[1]) if words[1:] else 0)
    check_writable(path)
    with atomic_path(path) as partial:
        render(scene).save(partial, format="png")
    asked = questions(scene, ASKED)
    print(f'lit-reduce predict image={path} prompt="{asked[0].prompt}"')
    for question in asked:
        print(f"{question.prompt} {question.answer}")


if __name__ == "__main__":
    sys.exit(run(main))
