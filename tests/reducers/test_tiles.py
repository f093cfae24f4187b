"""One budget for all tiles of a picture: hand-made overviews whose shares can be counted."""

import pytest
import torch
from torch.nn import functional as F

from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens

GRID = (5, 24, 24)  # an overview and 2 x 2 crops, as LLaVA-NeXT has


def tiled(batch: int = 1) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(batch, 5 * 576, generator=generator)
    deep, first = attention.clone(), attention.flip(1).clone()
    return VisualTokens(torch.rand(batch, 5 * 576, 4, generator=generator), GRID, {"cls": deep, "cls@0": first})


def counts(reducer, tokens, keep):
    reduction = reducer(tokens, keep)
    valid = torch.ones_like(reduction.kept_indices, dtype=torch.bool) if reduction.valid is None else reduction.valid
    return [
        torch.bincount(row[real] // 576, minlength=5).tolist()
        for row, real in zip(reduction.kept_indices, valid, strict=True)
    ]


def test_hired_shares_half_the_budget_by_the_overviews_hot_tokens():
    tokens = tiled()
    hot = torch.zeros(24, 24)
    hot[:12, :12] = 1  # 144 of the 288 hot tokens lie top left,
    hot[:12, 12:] = 1  # 144 top right
    tokens.signals["cls@0"][0, :576] = hot.flatten()
    assert counts(create("hired"), tokens, 576) == [[288, 144, 144, 0, 0]]
    hot[:12, 12:] = 0
    hot[12:, :12] = 1
    tokens.signals["cls@0"][0, :576] = hot.flatten()
    assert counts(create("hired"), tokens, 576) == [[288, 144, 0, 144, 0]]
    # 20 % of 5 x 576 tokens: half for the overview, the rest three ways.
    hot = torch.zeros(24, 24)
    hot[:12] = torch.rand(12, 24, generator=torch.Generator().manual_seed(1)) + 1
    tokens.signals["cls@0"][0, :576] = hot.flatten()
    assert sum(counts(create("hired"), tokens, 577)[0]) == 577


def test_hireds_official_code_mistakes_stripes_for_crops_and_loses_what_is_left_over():
    tokens = tiled()
    left = torch.zeros(24, 24)
    left[:, :12] = 1  # all hot tokens on the left
    tokens.signals["cls@0"][0, :576] = left.flatten()
    assert counts(create("hired"), tokens, 576) == [[288, 144, 0, 144, 0]]
    assert counts(create("hired", parity="official"), tokens, 576) == [[288, 72, 72, 72, 72]]
    assert counts(create("hired", parity="official"), tokens, 582) == [[291, 72, 72, 72, 72]], "291 = 4 x 72 + 3"


def test_hired_keeps_the_most_attended_of_each_tile():
    tokens = tiled()
    kept_indices = create("hired")(tokens, 300).kept_indices[0].tolist()
    for tile in range(5):
        mine = [n % 576 for n in kept_indices if n // 576 == tile]
        row = tokens.signals["cls"][0, tile * 576 : tile * 576 + 576].tolist()
        assert mine == sorted(sorted(range(576), key=lambda n: -row[n])[: len(mine)])


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
def test_an_overview_that_comes_last_gives_the_same_tokens(name):
    tokens = tiled()
    tokens.signals["cls@-1"] = tokens.signals["cls"]
    turned = {key: x.roll(-576, 1) for key, x in tokens.signals.items()}
    first = create(name)(tokens, 500).kept_indices[0]
    last = create(name, overview="last")(VisualTokens(tokens.features, GRID, turned), 500).kept_indices[0]
    assert torch.equal(first, ((last + 576) % 2880).sort().values)


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
def test_more_than_tiles_hold_goes_to_the_others_then_to_newlines(name):
    """An overview of 4, a whole of 2 x 3 with newlines: 12 tokens, of which 2 are newlines."""
    attention = torch.rand(2, 12, generator=torch.Generator().manual_seed(2))
    attention[:, [7, 11]] = 0
    tokens = VisualTokens(torch.rand(2, 12, 3), (1, 2, 3), {"cls": attention, "cls@0": attention, "cls@-1": attention})
    for keep in range(1, 12):
        reduction = create(name)(tokens, keep)
        assert ((reduction.kept_indices == 7) | (reduction.kept_indices == 11)).sum(1).tolist() == [
            max(0, keep - 10)
        ] * 2


def test_globalcom2_gives_crops_what_the_overview_thinks_of_them():
    tokens = tiled()
    attention = torch.full((1, 2880), 1.0)
    tokens.signals["cls@-1"] = attention
    reducer = create("globalcom2")
    assert counts(reducer, tokens, 720) == [[144, 144, 144, 144, 144]]
    attention[0, :576] = 0.5 + torch.tensor([[1.0, 0], [0, 0]]).kron(torch.ones(12, 12)).flatten()
    logits = (attention / attention.mean()).log()[0, :576].view(24, 24)
    sums = torch.stack([logits[r : r + 12, c : c + 12].sum() for r in (0, 12) for c in (0, 12)])
    p = (sums / 10).softmax(0)
    ratio = 0.25 * (1 + p - p.mean())
    exact = ratio * 576
    got = torch.tensor(counts(reducer, tokens, 720)[0])
    assert got[0] == 144
    assert got.sum() == 720
    assert torch.all((got[1:] - exact).abs() < 1)


def test_globalcom2_asks_both_the_crop_and_the_overview_about_a_token():
    tokens = tiled()
    attention = tokens.signals["cls"] + 0.1
    tokens.signals["cls@-1"] = attention
    logits = (attention / attention.mean()).log()[0].view(5, 24, 24)
    large = F.interpolate(logits[0][None, None], size=(48, 48), mode="bilinear", align_corners=False)[0, 0]
    kept_indices = create("globalcom2")(tokens, 600).kept_indices[0]
    for crop, (top, left) in enumerate([(0, 0), (0, 24), (24, 0), (24, 24)], start=1):
        own, seen = logits[crop].flatten(), large[top : top + 24, left : left + 24].flatten()
        score = own / own.norm() + seen / seen.norm()
        mine = kept_indices[kept_indices // 576 == crop] % 576
        assert mine.tolist() == score.topk(len(mine)).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
def test_crops_smaller_than_the_overview_leave_it_the_rest(name):
    """An overview of 4 and a whole of 1 x 2: of 5 tokens the crops can hold 2."""
    attention = torch.rand(1, 7, generator=torch.Generator().manual_seed(3)) + 0.1
    tokens = VisualTokens(torch.rand(1, 7, 3), (1, 1, 2), {"cls": attention, "cls@0": attention, "cls@-1": attention})
    for keep in range(1, 7):
        kept_indices = create(name)(tokens, keep).kept_indices[0]
        assert ((kept_indices == 4) | (kept_indices == 5)).sum() <= 2
        assert (kept_indices < 4).sum() >= keep - 3
    assert create(name)(tokens, 5).kept_indices[0].tolist()[-2:] == [4, 5]
