"""Attention for training: both ways give what a slow loop gives, and watched heads report what they did."""

import pytest
import torch

from lit_reduce_pocket import attention
from lit_reduce_pocket.attention import attend
from lit_reduce_pocket.guidance import ANSWERING, NAMING, Watched, watched_attention


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                logits = torch.stack([scaling * q[b, h, i] @ k[b, h, j] for j in range(k.shape[2])])
                if mask is not None:
                    logits = logits + mask[b, 0, i].double()
                out[b, h, i] = logits.softmax(0) @ v[b, h]
    return out


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), torch.finfo(torch.float32).min)
    return q, k, v, mask


@pytest.mark.parametrize("long", [3, 300], ids=["fused", "two passes"])
@pytest.mark.parametrize("masked", [True, False])
def test_both_ways_equal_a_slow_loop(monkeypatch: pytest.MonkeyPatch, long: int, masked: bool) -> None:
    monkeypatch.setattr(attention, "LONG", long)
    q, k, v, mask = drawn()
    kept = mask.clone()
    found = attend(q, k, v, mask if masked else None, 0.3)
    torch.testing.assert_close(found.double(), slow(q, k, v, mask if masked else None, 0.3), atol=1e-5, rtol=1e-5)
    assert torch.equal(mask, kept)


def test_watched_heads_report_where_text_looked_and_what_it_brought() -> None:
    q, k, v, mask = drawn()
    Watched.first, Watched.rows = 3, {}
    try:
        for index in range(6):
            layer = torch.nn.Identity()
            layer.layer_idx = index
            out, _ = watched_attention(layer, q, k, v, mask, 0.3)
            torch.testing.assert_close(out, attend(q, k, v, mask, 0.3).transpose(1, 2))
        rows = Watched.rows
    finally:
        Watched.rows = None
    assert set(rows) == {NAMING, *ANSWERING}
    looked, brought = rows[NAMING]
    assert looked.shape == (2, 3, 4, 7)
    told = torch.einsum("bhqk,bhkd->bhqd", looked.exp(), v[:, :3])  # the weights and the output must tell one story
    torch.testing.assert_close(told, brought, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(brought, out.transpose(1, 2)[:, :3, 3:])
