"""Falcon's start is average pooling, its delta follows a cell's place and size, and what it learns begins at nought."""

import math

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.ops.cells import cells
from lit_reduce.plugin import BackboneId, PluginConfig, create_for, load_plugin, save_plugin
from lit_reduce.reducer import create
from lit_reduce.reducers.falcon import PARTS
from lit_reduce.tokens import VisualTokens

SIZES = {"hidden_size": 7, "vision_hidden_size": 6, "blocks": 5, "start": 0.4}


def falcon(loud: bool = True, **options):
    reducer = create("falcon", **{**SIZES, **options}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in reducer.parameters() if loud else ():
        weight.normal_(0, 0.5, generator=generator)
    return reducer


@pytest.mark.parametrize("keep", [1, 7, 16, 23])
def test_untrained_registers_are_average_pooling_to_the_bit(keep, made):
    reducer = falcon(loud=False)
    tokens = made(reducer)
    start, pool = reducer(tokens, keep), create("pool")(tokens, keep)
    assert torch.equal(start.features, pool.features)
    assert torch.equal(start.kept_indices, pool.kept_indices)
    assert torch.equal(start.assignment, pool.assignment)


def test_untrained_updates_change_no_bit():
    reducer, x = falcon(loud=False), torch.randn(3, 4, 6)
    for block in range(2, 5):
        assert all(torch.equal(reducer.adapt(block, part, x, x + 1), x + 1) for part in PARTS)
        assert torch.equal(reducer.together(block, x, [2, 1]), x)
    y, pooled = torch.randn(2, 3, 4, 7)
    assert torch.equal(reducer.leave(x, y, pooled), pooled)
    torch.testing.assert_close(falcon(loud=False, mix=1.0).leave(x, y, pooled), y)


def test_only_blocks_with_registers_have_weights():
    reducer = falcon()
    assert reducer.stages(5, 36, 4) == {2: 4}
    assert {int(name[0]) for name in reducer.updates} == set(map(int, reducer.between)) == {2, 3, 4}
    bare = falcon(rank=0, projector_rank=0, reatten=0)
    assert [name for name, _ in bare.named_parameters()] == ["place", "size", "mix"]
    x = torch.randn(2, 3, 6)
    assert bare.adapt(3, "q", x, x) is x
    assert bare.together(3, x, [2]) is x


def test_the_delta_follows_place_and_size_and_nothing_else():
    """A table that is linear in its columns is read off exactly away from the border, whatever the budget."""
    reducer = falcon(loud=False, table=8)
    line = (torch.arange(8) + 0.5) / 8
    reducer.place[:] = line.expand(8, 8)
    reducer.size[:] = 1.0
    for keep in (64, 36, 16, 23):
        kept_indices, assignment = cells((1, 24, 24), 576, keep)
        delta = reducer.delta((1, 24, 24), assignment, keep)
        for cell in range(keep):
            inside = [n for n in range(576) if assignment[n] == cell]
            across = sum(n % 24 + 0.5 for n in inside) / len(inside) / 24
            expected = min(max(across, 1 / 16), 15 / 16) + math.log2(64 * len(inside) / 576)
            torch.testing.assert_close(delta[cell], torch.full((6,), expected), atol=1e-5, rtol=1e-5)
        assert len(kept_indices) == keep
    even = cells((1, 24, 24), 576, 64)[1]
    reducer.place[:] = 0
    assert torch.equal(reducer.delta((1, 24, 24), even, 64), torch.zeros(64, 6)), "64 even cells know no size"


def test_tiles_of_other_images_are_out_of_sight():
    reducer, x = falcon(), torch.randn(5, 3, 6)
    out = reducer.together(3, x, [2, 1, 2])
    assert torch.equal(out[2], x[2])
    changed = x.clone()
    changed[4] += 1
    again = reducer.together(3, changed, [2, 1, 2])
    assert torch.equal(again[:3], out[:3])
    assert float((again[3] - out[3]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [({"start": 1.0}, "start=1.0"), ({"blocks": 0}, "blocks=0"), ({"reatten": 6, "heads": 4}, "multiple of heads=4")],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        falcon(**options)


def test_other_towers_are_refused():
    reducer = falcon()
    with pytest.raises(UserError, match="blocks=23"):
        reducer.stages(23, 576, 64)
    with pytest.raises(UserError, match="vision_hidden_size=8"):
        reducer(VisualTokens(torch.randn(1, 24, 8), (1, 4, 6)), 4)


def test_a_plugin_gives_the_same_to_the_bit(tmp_path, made):
    backbone = BackboneId("tiny", "abc", "llava", 7, 6, 576)
    reducer = create_for(backbone, "falcon", {"blocks": 5})
    for weight in reducer.parameters():
        torch.nn.init.normal_(weight)
    save_plugin(tmp_path / "plugin", reducer, PluginConfig("falcon", {}, backbone, [16, 64]))
    loaded, config = load_plugin(tmp_path / "plugin")
    tokens, x = made(reducer), torch.randn(2, 3, 6)
    assert config.options["vision_hidden_size"] == 6
    assert torch.equal(loaded(tokens, 7).features, reducer(tokens, 7).features)
    assert torch.equal(loaded.adapt(4, "mlp", x, x), reducer.adapt(4, "mlp", x, x))
