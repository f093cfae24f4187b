"""Settings: the order of sources, typed values, presets, and errors that help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lit_reduce import settings
from lit_reduce.errors import UserError
from lit_reduce.options import check, limits_of, option
from lit_reduce.registry import Reference
from lit_reduce.settings import references as auto
from lit_reduce.settings.groups import BackboneSettings
from lit_reduce.settings.references import with_references
from lit_reduce.settings.train import DataSettings, TrainSettings


@dataclass
class Part:
    name: str = "none"
    depth: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bare:
    size: int = option(3, "how wide", min=1, was="width")


@dataclass
class Schema:
    """Do a thing.

    lit-reduce thing
    """

    keep: Any = option(20, "how many", min=1)
    rate: float = option(0.5, "how fast", above=0, max=1)
    prompt: str | None = option(None, "what to ask")
    words: list[str] = option([], "some words", choices=("grid", "pool", "a", "1"))
    part: Part = option(Part("small", 2, {"a": 1}), "a part")
    bare: Bare = option(Bare, "another part")


@dataclass
class Command:
    rate: float = 0.4
    steps: int = 2
    backbone: BackboneSettings = option(BackboneSettings("other"), "the backbone")
    preset: str = "auto"
    reducer: Part = option(Part("large"), "the reducer")


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name, text in {"part/other.yaml": "name: other\ndepth: 4\n", "bare/wide.yaml": "size: 9\n"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def resolve(configs: Path, *argv: str) -> Schema:
    return settings.resolve(Schema, argv, configs, "main")


def test_sources_in_order(configs: Path) -> None:
    (configs / "extra.yaml").write_text("keep: 30\nrate: 0.25\n")
    assert (resolve(configs).keep, resolve(configs).rate) == (20, 0.5)  # the dataclass
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
    assert resolve(configs, "part.depth=7", "part=other").part.depth == 7
    assert resolve(configs, "part=other").part == Part("other", 4, {})  # small is forgotten
    assert resolve(configs, "part=some/folder").part.name == "some/folder"
    assert resolve(configs, "part.options.b=[1]").part.options == {"a": 1, "b": [1]}
    assert resolve(configs, "bare=wide").bare.size == 9
    resolve(configs, "part.options.b=1")
    assert resolve(configs).part.options == {"a": 1}, "defaults are not shared"


def test_a_preset_follows_the_backbone_and_the_user_wins_over_it(tmp_path: Path) -> None:
    for name, text in {
        "preset/tuned/train.yaml": "steps: 3\n",
        "preset/tuned/small.yaml": "rate: 0.3\nreducer: {options: {depth: 6}}\n",
        "mine.yaml": "reducer: {name: small}\nsteps: 4\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)

    def chosen(*words: str, command: str = "train") -> tuple[float, int, str, dict[str, Any], str]:
        one = settings.resolve(Command, words, tmp_path, command)
        return one.rate, one.steps, one.reducer.name, one.reducer.options, one.preset

    assert chosen() == (0.4, 2, "large", {}, "none")
    assert chosen("backbone=tuned") == (0.4, 3, "large", {}, "tuned")
    assert chosen("preset=tuned") == (0.4, 3, "large", {}, "tuned")
    assert chosen("preset=none", "backbone=tuned") == (0.4, 2, "large", {}, "none")
    small = (0.3, 3, "small", {"depth": 6}, "tuned")
    assert chosen("backbone=tuned", "reducer=small") == small
    assert chosen("reducer.name=small", "backbone.name=tuned") == small
    assert chosen("reducer=some/small", "preset=tuned") == (0.4, 3, "some/small", {}, "tuned")
    assert chosen("preset=tuned", "reducer=small", "reducer.options.depth=1", "steps=9")[1:4] == (
        9,
        "small",
        {"depth": 1},
    )
    assert chosen("preset=tuned", f"config={tmp_path / 'mine.yaml'}") == (0.3, 4, "small", {"depth": 6}, "tuned")
    assert chosen("preset=tuned", "reducer=small", command="bench") == (0.4, 2, "small", {"depth": 6}, "tuned")
    one = settings.resolve(Command, ["backbone=tuned", "reducer=small", "rate=0.9"], tmp_path, "train")
    settings.save(one, tmp_path / "saved.yaml")
    assert settings.resolve(Command, [f"config={tmp_path / 'saved.yaml'}"], tmp_path, "train") == one
    with pytest.raises(UserError, match="preset=tunde is not known: use tuned, none"):
        chosen("preset=tunde")
    (tmp_path / "preset" / "tuned" / "small.yaml").write_text("rat: 1")
    with pytest.raises(UserError, match=r"small\.yaml: did you mean rate"):
        chosen("reducer=small", "preset=tuned")


def test_auto_is_the_default_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass
    class Ask:
        backbone: BackboneSettings = option(BackboneSettings, "the backbone")
        reducer: Part = option(Part("auto"), "the reducer")
        data: str | None = "auto"

    known = {"a": Reference("a", lambda: tmp_path, plugins=tmp_path, plugin="p"), "b": Reference("b", lambda: tmp_path)}
    monkeypatch.setattr(auto, "references", lambda: known)
    monkeypatch.setattr(auto, "default_reference", lambda: known["a"])
    one = settings.resolve(Ask, [], tmp_path, "ask")
    assert (one.backbone.name, one.reducer.name, one.data) == ("a", "a/p", "a")
    with pytest.raises(UserError, match="b comes with no plug-in: write reducer=PLUGIN"):
        settings.resolve(Ask, ["backbone=b"], tmp_path, "ask")
    assert settings.resolve(Ask, ["backbone=b", "reducer=none"], tmp_path, "ask").data == "a"
    monkeypatch.setattr(auto, "default_reference", lambda: None)
    with pytest.raises(UserError, match="no reference model is installed: give backbone=FOLDER"):
        settings.resolve(Ask, [], tmp_path, "ask")


@pytest.mark.parametrize(
    "text", ["What colour: red, or blue?", "42", "cost ${5}", "[a]", "is it a=b?", "null set", "#1", "'quoted'", "true"]
)
def test_texts_stay_as_typed_and_survive_a_save(configs: Path, text: str) -> None:
    one = resolve(configs, f"prompt={text}")
    assert one.prompt == text
    settings.save(one, configs / "saved.yaml")
    assert resolve(configs, f"config={configs / 'saved.yaml'}") == one


def test_values_are_typed(configs: Path) -> None:
    one = resolve(configs, "rate=1e-3", "keep=1.25", "words=[a,'1']")
    assert (one.rate, one.keep, one.words) == (0.001, 1.25, ["a", "1"])
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
        ("bare.width=3", "setting bare.width in bare.width=3 is now called bare.size"),
        ("rate=0", "rate=0.0: give above 0 and at most 1"),
        ("rate=1.5", "rate=1.5: give above 0 and at most 1"),
        ("keep=[4,0]", "keep=[4, 0]: give 1 or more"),
        ("bare.size=0", "bare.size=0: give 1 or more"),
        ("words=[pool,pond]", "words=['pool', 'pond']: use grid, pool, a, 1"),
    ],
)
def test_errors_are_one_helpful_line(configs: Path, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(configs, word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("kep: 3", "mean keep"), ("- a", "no key"), ("a: [", "valid YAML"), ("bare: {width: 2}", "now called bare.size")],
)
def test_files_are_checked_like_words(configs: Path, text: str, message: str) -> None:
    (configs / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve(configs, f"config={configs / 'mine.yaml'}")
    assert "\n" not in str(caught.value)
    (configs / "part" / "other.yaml").write_text("dept: 3")
    with pytest.raises(UserError, match=r"other\.yaml: did you mean depth"):
        resolve(configs, "part=other")


def test_a_missing_setting_is_named(configs: Path) -> None:
    @dataclass
    class Needs:
        data: str

    with pytest.raises(UserError, match="setting data is missing"):
        settings.resolve(Needs, [], configs, "needs")
    assert settings.resolve(Needs, ["data=x"], configs, "needs").data == "x"


@pytest.mark.parametrize(
    ("limits", "words", "good", "bad"),
    [
        ({"min": 1}, "1 or more", [1, 2.5, None, [1, 2]], [0, [1, 0.5]]),
        ({"min": 0, "max": 1}, "0 to 1", [0, 1, 0.5], [-1, 1.1]),
        ({"max": 1}, "at most 1", [-3, 1], [2]),
        ({"above": 0}, "above 0", [0.1], [0]),
        ({"min": 0, "below": 1}, "0 or more and below 1", [0, 0.9], [1, -0.1]),
        ({"choices": ("a", "b")}, "a, b", ["a", ["a", "b"], None], ["c", ["a", "c"]]),
        ({"min_items": 1}, "1 value at least", [[3], 3], [[]]),
        ({"min_items": 2, "min": 1}, "2 values at least, each 1 or more", [[1, 2]], [[1], [1, 0]]),
    ],
)
def test_limits(limits: dict[str, Any], words: str, good: list[Any], bad: list[Any]) -> None:
    @dataclass
    class One:
        x: Any = option(None, "a value", **limits)

    assert limits_of(One.__dataclass_fields__["x"].metadata) == words
    for value in good:
        check(One(value))
    for value in bad:
        with pytest.raises(UserError) as caught:
            check(One(value), "me")
        assert str(caught.value) == f"me: x={value}: {'use' if 'choices' in limits else 'give'} {words}"


def test_help_shows_comments_and_validate_shows_the_result(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (configs / "preset" / "tuned").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        resolve(configs, "--help", "kep=3")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# Do a thing.\n#\n# lit-reduce thing\n")
    assert "# how many (1 or more)\nkeep: 20\n" in shown
    assert "# some words (one of grid, pool, a, 1)\nwords: []\n" in shown
    assert "bare:\n  # how wide (1 or more)\n  size: 3\n" in shown
    assert "preset=" not in shown
    with pytest.raises(SystemExit):
        settings.resolve(Command, ["--help"], configs, "train")
    assert "# preset= one of: tuned, none" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        resolve(configs, "--validate", "keep=5")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    (configs / "shown.yaml").write_text(shown)
    assert resolve(configs, f"config={configs / 'shown.yaml'}") == resolve(configs, "keep=5")


def test_a_program_may_leave_names_to_the_reference_model() -> None:
    settings = with_references(TrainSettings())
    assert (settings.backbone.name, settings.data.name) == ("pocket", "pocket")
    given = TrainSettings(BackboneSettings("somewhere"), data=DataSettings("rows.jsonl"))
    assert with_references(given) == given
