"""Attention to keys beside a layer's own, against explicit softmax in float64, query by query."""

import torch

from lit_reduce.ops.attention import attend, grouped_attention, join_softmax
from lit_reduce.ops.similarity import rms_normalize


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_two_sets_of_keys_are_joined_as_if_there_were_one_softmax() -> None:
    batch, heads, groups, rows, width, own, many = 2, 6, 2, 3, 4, 7, 5
    q, k, v = draw(batch, heads, rows, width), draw(batch, groups, own, width), draw(batch, groups, own, width + 1)
    more_k, more_v = draw(batch, groups, many, width + 2)[..., :width], draw(batch, groups, many, width + 1)
    seen = draw(batch, rows, many) > 0
    seen[1, 2] = False  # a query that sees no further key
    whole = torch.ones(batch, rows, own, dtype=torch.bool)
    answer, mass = attend(q, k, v, whole, 0.3)
    more, more_mass = attend(q, more_k, more_v, seen, 0.3)
    for gate in (0.0, 0.4, 1.0):
        found = join_softmax(answer, mass, more, more_mass, torch.tensor(gate, dtype=torch.float64))
        for b in range(batch):
            for h in range(heads):
                g = h // (heads // groups)
                for r in range(rows):
                    base = (k[b, g] @ q[b, h, r] * 0.3).softmax(0) @ v[b, g]
                    keys = torch.cat([k[b, g], more_k[b, g][seen[b, r]]])
                    values = torch.cat([v[b, g], more_v[b, g][seen[b, r]]])
                    joint = (keys @ q[b, h, r] * 0.3).softmax(0) @ values
                    torch.testing.assert_close(found[b, r, h], (1 - gate) * base + gate * joint)
    assert torch.equal(join_softmax(answer, mass, more, more_mass, torch.tensor(0.0)), answer)


def test_a_query_that_sees_nothing_has_gradients() -> None:
    q, k = draw(1, 2, 1, 3).requires_grad_(), draw(1, 2, 4, 3).requires_grad_()
    answer, mass = attend(q, k, k, torch.ones(1, 1, 4, dtype=torch.bool), 1.0)
    more, more_mass = attend(q, k, k, torch.zeros(1, 1, 4, dtype=torch.bool), 1.0)
    gate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    join_softmax(answer, mass, more, more_mass, gate).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, gate))
    assert float(gate.grad) == 0


def test_softmax_within_groups() -> None:
    assignment = torch.tensor([[0, 0, 2, 2, 2, -1], [1, 1, 1, 0, -1, 2]])
    logits, values = 5 * draw(2, 6, 3), draw(2, 6, 3, 4)
    found = grouped_attention(logits, values, assignment, 4)
    for b in range(2):
        for k in range(4):
            mine = assignment[b] == k
            for h in range(3):
                wanted = logits[b, mine, h].softmax(0) @ values[b, mine, h]
                torch.testing.assert_close(found[b, k, h], wanted)
    assert not found[0, [1, 3]].any()


def test_normal_tokens_have_size_one() -> None:
    x = draw(3, 8) * torch.tensor([[1e-2], [1.0], [50.0]])
    torch.testing.assert_close(rms_normalize(x).square().mean(-1), torch.ones(3, dtype=x.dtype), atol=0.02, rtol=0)
