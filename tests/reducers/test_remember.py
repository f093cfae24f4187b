"""Vision Remember: equal to what it stands on at first; then each token reads its own region and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.recall import TokenRecall
from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens

LEVELS = [0.5, -1]


def build(short: str = "packer", gate: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    inner = {"width": 8, "heads": 2} if short == "packer" else {}
    sizes = {"hidden_size": 6, "vision_hidden_size": 5, "depth": 10, "width": 8, "heads": 2}
    reducer = create("remember", short=short, options=inner, levels=LEVELS, **sizes, **options).eval().double()
    for weight in reducer.parameters():
        torch.nn.init.normal_(weight, 0, 0.5)
    for read in reducer.reads_again:
        torch.nn.init.constant_(read.gate, gate)
    return reducer


def made(reducer: Any, batch: int = 2) -> VisualTokens:
    g = torch.Generator().manual_seed(1)
    signals = {name: torch.randn(batch, 24, 5, generator=g).double() for name in reducer.signals}
    return VisualTokens(torch.randn(batch, 24, 6, generator=g).double(), (1, 4, 6), signals)


def loop(read: Any, hidden: Tensor, memory: Tensor, assignment: Tensor) -> Tensor:
    """Token by token, head by head."""
    out = hidden.clone()
    width = read.query.out_features // read.heads
    for k in range(len(hidden)):
        mine = memory[assignment == k]
        heads = []
        for h in range(read.heads):
            part = slice(h * width, (h + 1) * width)
            query = read.query(read.norm(hidden[k]))[part]
            keys, values = (x[:, part] for x in read.both(mine).chunk(2, -1))
            weight = (keys @ query / width**0.5 + read.salience(mine)[:, h]).softmax(0)
            heads.append(weight @ values)
        scale = hidden[k].square().mean().sqrt()
        out[k] += torch.tanh(20 * read.gate) * scale * read.leave(torch.cat(heads))
    return out


@pytest.mark.parametrize("short", ["packer", "pool"])
def test_each_token_reads_its_own_region(short: str) -> None:
    reducer = build(short, gate=0.03)
    tokens = made(reducer)
    reduction = reducer(tokens, 6)
    inner = reducer.short(tokens, 6)
    assert torch.equal(reduction.features, inner.features)
    wanted = torch.cat([rms_normalize(tokens.signal(f"encoder@{level}")) for level in LEVELS], -1)
    assert torch.equal(reduction.memory, wanted)
    hidden = torch.randn(2, 6, 6, dtype=torch.float64)
    assignment = reduction.assignment.clone()
    assignment[1, 3] = -1
    for number, layer in enumerate(reducer.recalls(10)):
        found = reducer(TokenRecall(layer, hidden, reduction.memory, assignment))
        for b in range(2):
            expected = loop(reducer.reads_again[number], hidden[b], reduction.memory[b], assignment[b])
            torch.testing.assert_close(found[b], expected)
            assert not torch.allclose(found[b], hidden[b], atol=1e-2)


def test_shut_gates_leave_the_short_stream_alone_but_learn() -> None:
    reducer = build()
    tokens = made(reducer)
    reduction = reducer(tokens, 6)
    hidden = torch.randn(2, 6, 6, dtype=torch.float64)
    look = TokenRecall(2, hidden, reduction.memory, reduction.assignment)
    assert torch.equal(reducer(look), hidden)
    (reducer(look) * torch.randn(2, 6, 6)).sum().backward()
    assert reducer.reads_again[0].gate.grad.abs() > 1e-3


def test_layers_and_guidance_follow_from_the_settings() -> None:
    assert build().recalls(10) == [2, 5, 8]
    assert build(layers=[3, 0.5]).recalls(10) == [3, 5]
    assert build().warmup_target == "tokens"
    assert build("pool").warmup_target == ""
    assert build().signals == {"encoder@0.5", "encoder@-1"}


def test_settings_that_cannot_be() -> None:
    for options, message in (
        ({"layers": []}, "give 1 value at least"),
        ({"layers": 3}, r"must be of type list\[float\]"),
    ):
        with pytest.raises(UserError, match=message):
            build(**options)
    for short in ("grid", "fastv", "flexattention"):
        with pytest.raises(UserError, match=f"short={short}"):
            build(short)
    with pytest.raises(UserError, match="multiple of heads"):
        create("remember", width=9)
    reducer = build()
    tokens = made(reducer)
    wide = {name: torch.cat([x, x], -1) for name, x in tokens.signals.items()}
    with pytest.raises(UserError, match="vision_hidden_size=10"):
        reducer(VisualTokens(tokens.features, tokens.grid, wide), 6)
