"""Reducers with weights in every family: what they read of tower and prompt fits, and dropping equals hiding."""

from typing import Any

import pytest
import torch
from families import FAMILIES, VIDEO_FAMILIES, build
from hidden import hide

from lit_reduce.backbones.identity import identify
from lit_reduce.plugin import create_for
from lit_reduce.runtime import attach

KEEP, TOLERANCE = 0.4, 1e-4  # float32; weights of std 0.25 make logits of about 5
# Gemma3's window counts the tokens that are left, so a mask over the full prompt says another thing: see `test_matrix`.
ALL = [family for family in (*FAMILIES, *VIDEO_FAMILIES) if family != "gemma3"]
TRAINED: dict[str, dict[str, Any]] = {
    "packer": {"width": 16, "heads": 2, "levels": [0.5, -1], "text": True},
    "covipal": {"width": 16, "heads": 2, "summary": 2},
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_dropping_equals_hiding(family: str, name: str) -> None:
    """In prefill, at every token that stays; batch of two, unequal counts, left padding."""
    tiny = build(family)
    reducer = create_for(identify(tiny.model), name, TRAINED[name]).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in reducer.parameters():
        weight.normal_(0, 0.25, generator=generator)
    expected = tiny.model(**hide(tiny, tiny.inputs, reducer, KEEP)).logits
    pooled = tiny.model(**hide(tiny, tiny.inputs, create_for(identify(tiny.model), "pool", {}), KEEP)).logits
    with attach(tiny.model, reducer, keep=KEEP) as attached:
        logits = tiny.model(**tiny.inputs).logits
    seen = attached.logical.selected
    assert 0 < attached.stats.kept < attached.stats.total
    assert float((logits - expected)[seen].abs().max()) < TOLERANCE
    assert float((logits - pooled)[seen].abs().max()) > 0.1, "the weights must matter, or the test proves nothing"
