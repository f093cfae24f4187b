"""Settings: the order of sources, typed values, and errors that help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lit_reduce import settings
from lit_reduce.errors import UserError


@dataclass
class Part:
    name: str = "none"
    depth: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bare:
    size: int = 3


@dataclass
class Schema:
    keep: Any = 10
    rate: float = 0.5
    prompt: str | None = None
    words: list[str] = field(default_factory=list)
    part: Part = field(default_factory=Part)
    bare: Bare = field(default_factory=Bare)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name, text in {
        "main.yaml": "# how many\nkeep: 20\npart: small\n",
        "part/small.yaml": "name: small\ndepth: 2\noptions: {a: 1}\n",
        "part/large.yaml": "name: large\n",
        "bare/wide.yaml": "size: 9\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def resolve(configs: Path, *argv: str) -> Schema:
    return settings.resolve(Schema, argv, configs, "main")


def test_sources_in_order(configs: Path) -> None:
    (configs / "extra.yaml").write_text("keep: 30\nrate: 0.25\n")
    assert resolve(configs).rate == 0.5  # the dataclass
    assert resolve(configs).keep == 20  # the defaults file over it
    assert resolve(configs, f"config={configs / 'extra.yaml'}").keep == 30  # a given file over that
    last = resolve(configs, "keep=[64, 32]", f"config={configs / 'extra.yaml'}")  # words over all, wherever they stand
    assert (last.keep, last.rate) == ([64, 32], 0.25)


def test_options_of_one_reducer_are_not_those_of_the_next(configs: Path) -> None:
    (configs / "saved.yaml").write_text("part: {name: other, options: {b: 2}}\n")
    assert resolve(configs).part.options == {"a": 1}
    assert resolve(configs, f"config={configs / 'saved.yaml'}").part == Part("other", 2, {"b": 2})
    assert resolve(configs, "part.name=other").part.options == {}
    for words in (["part.name=other", "part.options.c=3"], ["part.options.c=3", "part.name=other"]):
        assert resolve(configs, *words).part.options == {"c": 3}
    assert resolve(configs, "part.name=small", "part.options.c=3").part.options == {"a": 1, "c": 3}


def test_one_word_is_a_list_of_one(configs: Path) -> None:
    assert resolve(configs, "words=grid").words == ["grid"]
    assert resolve(configs, "words=[grid, pool]").words == ["grid", "pool"]
    assert resolve(configs, "keep=64").keep == 64  # only where a list is asked for


def test_groups(configs: Path) -> None:
    assert resolve(configs).part == Part("small", 2, {"a": 1})
    assert resolve(configs, "part.depth=7", "part=large").part == Part("large", 7, {})  # small is forgotten
    assert resolve(configs, "part=some/folder").part == Part("some/folder")
    assert resolve(configs, "part.options.b=[1]").part.options == {"a": 1, "b": [1]}
    assert resolve(configs, "bare=wide").bare.size == 9


def test_a_reducer_brings_its_preset(tmp_path: Path) -> None:
    @dataclass
    class Command:
        rate: float = 0.5
        steps: int = 1
        reducer: Part = field(default_factory=Part)

    for name, text in {
        "main.yaml": "rate: 0.4\nsteps: 2\nreducer: large\n",
        "main/small.yaml": "rate: 0.3\nsteps: 3\n",
        "reducer/small.yaml": "name: small\ndepth: 2\n",
        "mine.yaml": "reducer: small\nsteps: 4\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def chosen(*words: str) -> tuple[float, int, str, int]:
        one = settings.resolve(Command, words, tmp_path, "main")
        return one.rate, one.steps, one.reducer.name, one.reducer.depth

    assert chosen() == (0.4, 2, "large", 1)
    assert chosen("reducer=small") == (0.3, 3, "small", 2)
    assert chosen("reducer.name=small") == (0.3, 3, "small", 1)
    assert chosen("steps=9", "reducer=small") == (0.3, 9, "small", 2)  # words over the preset
    assert chosen(f"config={tmp_path / 'mine.yaml'}") == (0.3, 4, "small", 2)  # and files of the user's
    assert chosen("reducer=some/small") == (0.4, 2, "some/small", 1)
    saved = settings.to_yaml(settings.resolve(Command, ["reducer=small", "rate=0.9"], tmp_path, "main"))
    (tmp_path / "saved.yaml").write_text(saved)
    assert chosen(f"config={tmp_path / 'saved.yaml'}") == (0.9, 3, "small", 2)
    (tmp_path / "main" / "small.yaml").write_text("rat: 1")
    with pytest.raises(UserError, match=r"small\.yaml: did you mean rate"):
        chosen("reducer=small")


@pytest.mark.parametrize(
    "text", ["What colour: red, or blue?", "42", "cost ${5}", "[a]", "is it a=b?", "null set", "#1", "'quoted'", "true"]
)
def test_texts_stay_as_typed_and_survive_a_save(configs: Path, text: str) -> None:
    one = resolve(configs, f"prompt={text}")
    assert one.prompt == text
    settings.save(one, configs / "saved.yaml")
    assert resolve(configs, f"config={configs / 'saved.yaml'}") == one


def test_values_are_typed(configs: Path) -> None:
    one = resolve(configs, "rate=1e-3", "keep=0.25", "words=[a,'1']")
    assert (one.rate, one.keep, one.words) == (0.001, 0.25, ["a", "1"])
    assert resolve(configs, "prompt=").prompt is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kep=3", "unknown setting kep in kep=3: did you mean keep?"),
        ("part.dept=3", "did you mean part.depth?"),
        ("depht=3", "did you mean part.depth?"),
        ("promt=a b", "did you mean prompt?"),
        ("rate=fast", "bad value in rate=fast"),
        ("part.depth=deep", "bad value in part.depth=deep"),
        ("rate=[1", "cannot read the value in rate="),
        ("bare=huge", "there are wide"),
        ("keep", "settings are written key=value"),
        ("=3", "settings are written key=value"),
        ("--keep=3", "unknown option --keep=3"),
        ("config=none.yaml", "cannot read settings file none.yaml"),
    ],
)
def test_errors_are_one_helpful_line(configs: Path, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(configs, word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("kep: 3", "mean keep"), ("- a", "no key"), ("a: [", "valid YAML")])
def test_files_are_checked_like_words(configs: Path, text: str, message: str) -> None:
    (configs / "main.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(configs)
    (configs / "main.yaml").write_text("")
    (configs / "part" / "small.yaml").write_text("dept: 3")
    with pytest.raises(UserError, match=r"small\.yaml: did you mean depth"):
        resolve(configs, "part=small")


def test_a_missing_setting_is_named(configs: Path) -> None:
    @dataclass
    class Needs:
        data: str

    (configs / "needs.yaml").write_text("")
    with pytest.raises(UserError, match="setting data is missing"):
        settings.resolve(Needs, [], configs, "needs")
    assert settings.resolve(Needs, ["data=x"], configs, "needs").data == "x"


def test_help_shows_comments_and_validate_shows_the_result(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        resolve(configs, "--help", "kep=3")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "# how many\nkeep: 20" in shown
    assert "part= one of: large, small" in shown
    (configs / "main").mkdir()
    (configs / "main" / "huge.yaml").write_text("keep: 7")
    with pytest.raises(SystemExit):
        resolve(configs, "--help")
    shown = capsys.readouterr().out
    assert "(configs/main/): huge" in shown
    assert "main=" not in shown  # presets are no group
    with pytest.raises(SystemExit) as stop:
        resolve(configs, "--validate", "keep=5")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    (configs / "shown.yaml").write_text(shown)
    assert resolve(configs, f"config={configs / 'shown.yaml'}") == resolve(configs, "keep=5")
