from PIL import Image

from lit_reduce.console import run
from lit_reduce_pocket.draw import main
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import make_scene


def test_a_test_scene_is_written_with_what_to_ask(tmp_path, capsys) -> None:
    assert run(main, [str(tmp_path / "scene.png"), "3"]) == 0
    command, *lines = capsys.readouterr().out.splitlines()
    scene = make_scene("test", 3)
    assert Image.open(tmp_path / "scene.png").tobytes() == render(scene).tobytes()
    asked = [(question.prompt, question.answer) for question in questions(scene, len(lines))]
    assert lines == [f"{prompt} {answer}" for prompt, answer in asked]
    assert command == f'lit-reduce predict image={tmp_path / "scene.png"} prompt="{asked[0][0]}"'


def test_other_words_are_refused(tmp_path, capsys) -> None:
    for words in ([], ["scene.jpg"], ["scene.png", "x"], ["a.png", "1", "2"]):
        assert run(main, words) == 2, words
    assert not list(tmp_path.iterdir())
