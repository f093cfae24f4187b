"""Opening a reducer by name, folder, path or object."""

from pathlib import Path

import pytest

from lit_reduce.errors import UserError
from lit_reduce.plugin import BackboneId, PluginConfig, open_reducer, save_plugin
from lit_reduce.reducer import create

BACKBONE = BackboneId("pocket", "0123456789abcdef" * 4, "llava", 8, 16, 24)


def test_what_a_reducer_is_called(tmp_path, monkeypatch):
    """A name, a folder, a path or the object; one function for every command and for attach."""
    monkeypatch.chdir(tmp_path)
    reducer = create("random", seed=3)
    assert open_reducer(reducer) == (reducer, None)
    named, config = open_reducer("random", {"seed": 4})
    assert (named.config.seed, config, named.training) == (4, None, False)
    save_plugin("random", reducer, PluginConfig("random", {}, BACKBONE, [4], positions="renumber"))
    assert open_reducer("random")[1] is None, "a word of the register is the reducer"
    for place in ("./random", Path("random"), tmp_path / "random"):
        found, config = open_reducer(place)
        assert (found.config.seed, config.positions, found.training) == (3, "renumber", False)
    with pytest.raises(UserError, match="carries its own"):
        open_reducer("./random", {"seed": 1})
    with pytest.raises(UserError, match="covipal must be trained"):
        open_reducer("covipal")
    with pytest.raises(UserError, match="did you mean 'random'"):
        open_reducer("randon")
    with pytest.raises(UserError, match="no plug-in at"):
        open_reducer("./none")
