"""Plug-ins that earlier versions wrote still load and give what they gave then.

Each folder under formats/ was saved by the version it stands for, with what its reducer returned there:

- first: the first layout; its backbone records no depth.
- with_rest: the backbone records a depth, and covipal's option ``summary`` is called ``rest``.
"""

import json
from pathlib import Path

import pytest
import torch

from lit_reduce.plugin import load_plugin
from lit_reduce.tokens import VisualTokens

FORMATS = sorted((Path(__file__).parent / "formats").iterdir())


@pytest.mark.filterwarnings("error:.*ignoring unknown entries")
@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_an_earlier_format_gives_the_same_reduction(folder):
    reducer, config = load_plugin(folder)
    draw = torch.Generator().manual_seed(0)
    features, text = torch.randn(2, 12, 8, generator=draw), torch.randn(2, 3, 8, generator=draw)
    signals = {"text": text, "text_mask": torch.ones(2, 3, dtype=torch.bool)}
    tokens = VisualTokens(features, (1, 3, 4), signals)
    reduction = reducer(tokens, 8)
    expected = json.loads((folder / "expected.json").read_text())
    assert reduction.kept_indices.tolist() == expected["kept_indices"]
    sums = reduction.gather(tokens).double().sum(-1)
    torch.testing.assert_close(sums, torch.tensor(expected["features"], dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert config.backbone.depth == (0 if folder.name == "first" else 4)
    assert reducer.config.summary == (2 if folder.name == "with_rest" else 0)
    assert "rest" not in config.options
