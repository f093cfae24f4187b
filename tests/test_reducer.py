"""The base classes and the register."""

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
import torch

import lit_reduce.reducer as module
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, ReducerConfig, ScoringReducer, available, create, find, register
from lit_reduce.tokens import VisualTokens


@dataclass
class ToyConfig(ReducerConfig):
    size: int = field(default=2, metadata={"help": "how big"})
    rate: float = 0.5
    wide: bool = False
    mode: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})


class Toy(ScoringReducer):
    name = "toy"
    signals = frozenset({"cls"})
    config_class = ToyConfig
    calls = 0

    def score(self, tokens):
        type(self).calls += 1
        return tokens.signal("cls")


@pytest.fixture(autouse=True)
def clean_register(monkeypatch):
    available()
    monkeypatch.setattr(module, "_REGISTER", dict(module._REGISTER))
    monkeypatch.setattr(module, "_FAILED", {})


def tokens(batch=2, count=6, **signals):
    return VisualTokens(torch.randn(batch, count, 3), (1, 1, count), signals)


def test_scoring_reducer_keeps_the_best_in_raster_order():
    cls = torch.tensor([[0.0, 5, 1, 5, 2, 5], [3, 3, 3, 3, 3, 3]])
    reduction = Toy()(tokens(cls=cls), 2)
    assert reduction.kept_indices.tolist() == [[1, 3], [0, 1]]
    assert torch.equal(reduction.scores, cls)
    assert reduction.features is None
    assert reduction.valid is None


def test_keep_all_is_every_token_without_scoring_or_signals():
    Toy.calls = 0
    given = tokens()
    reduction = Toy()(given, 6)
    assert Toy.calls == 0
    assert reduction.kept_indices.tolist() == [list(range(6))] * 2
    assert torch.equal(reduction.gather(given), given.features)


@pytest.mark.parametrize("keep", [0, -1, 7])
def test_keep_out_of_range_names_the_limit(keep):
    with pytest.raises(UserError, match=rf"keep={keep}: .*1 to 6"):
        Toy()(tokens(cls=torch.zeros(2, 6)), keep)


def test_a_missing_signal_is_named():
    with pytest.raises(UserError, match="the signal 'cls' is missing"):
        Toy()(tokens(), 3)


def test_abstract_methods_say_what_to_write():
    with pytest.raises(NotImplementedError, match="Reducer must define reduce"):
        Reducer()(tokens(), 3)
    with pytest.raises(NotImplementedError, match="ScoringReducer must define score"):
        ScoringReducer()(tokens(), 3)


def test_register_create_find():
    assert register(Toy) is Toy
    assert register(Toy) is Toy, "importing a module twice is no conflict"
    made = create("toy", size=3, rate=1)
    assert isinstance(made, Toy)
    assert made.config == ToyConfig(size=3, rate=1)
    assert find("toy") is Toy
    assert list(available()) == sorted(available())
    assert {"random", "grid", "pool", "fastervlm", "divprune", "toy"} <= set(available())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 3}, "toy: unknown option 'sise'; did you mean 'size'"),
        ({"size": "3"}, "option 'size' must be of type int, not '3'"),
        ({"size": True}, "must be of type int"),
        ({"size": 1.5}, "must be of type int"),
        ({"wide": 1}, "must be of type bool"),
        ({"rate": None}, "must be of type float"),
        ({"mode": "c"}, "toy: mode=c: use a, b"),
    ],
)
def test_wrong_options_are_refused(options, message):
    register(Toy)
    with pytest.raises(UserError, match=message):
        create("toy", **options)


def test_a_mandatory_option_is_asked_for():
    @dataclass
    class Strict(ReducerConfig):
        size: int

    with pytest.raises(UserError, match="toy: missing 1 required positional argument: 'size'"):
        Strict.from_options({}, owner="toy")


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"unknown reducer 'fastervml'; did you mean 'fastervlm'\? \(known: .*random"):
        create("fastervml")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "Toy"}, "lower-case"),
        ({"name": ""}, "lower-case"),
        ({"name": "a/b"}, "lower-case"),
        ({"name": "t", "kind": "guess"}, "kind must be one of"),
        ({"name": "t", "site": "moon"}, "site one of"),
        ({"name": "t", "config_class": dict}, "must be a dataclass"),
        ({"name": "random"}, "is taken by lit_reduce.reducers.random"),
    ],
)
def test_register_refuses_bad_classes(attributes, message):
    with pytest.raises(ValueError, match=message):
        register(type("Bad", (Reducer,), attributes))


class Point(EntryPoint):
    def load(self):
        if self.value == "broken":
            raise ImportError("no such thing")
        assert self.value != "thief", "a name that is taken must not even be imported"
        return Toy


def test_entry_points_of_other_packages_are_found_and_cannot_break_or_replace_ours(monkeypatch):
    points = [
        Point("toy", "good", "g"),
        Point("odd", "broken", "g"),
        Point("alias", "good", "g"),
        Point("random", "thief", "g"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "lit_reduce.reducers" else [])
    with pytest.warns(UserWarning, match="does not load") as caught:
        known = available()
    assert [str(warning.message) for warning in caught] == [
        "reducer 'odd' of broken does not load: no such thing",
        "reducer 'alias' of good does not load: it calls itself 'toy'",
    ]
    assert "random" not in module._FAILED
    assert known["toy"] is Toy
    assert known["random"].__module__ == "lit_reduce.reducers.random"
    with pytest.raises(UserError, match="'odd' is announced but does not load: ImportError"):
        create("odd")
