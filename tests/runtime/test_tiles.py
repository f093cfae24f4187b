"""Several tiles in one picture: they are one picture with one budget, wherever its tiles stand in the prompt."""

import pytest
import torch
from families import GLOBAL, IMAGE, Tiny, build
from hidden import hide

from lit_reduce.reducer import create
from lit_reduce.runtime import attach, encode

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TILES = [[3, 1], [2]]  # two pictures in the first prompt, one in the second


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tiled(family):
    """Three pictures of 3, 1 and 2 tiles: each tile announced by its place, or all of a picture touching."""
    tiny = build(family)
    announced = family != "internvl"

    def picture(count):
        row = []
        for tile in range(count):
            last = tile == count - 1
            row += [7] * announced + [GLOBAL if last else 90 + tile] * announced + [IMAGE] * 9
        return [*row, 5, 6]

    rows = [[11, 12, *(t for n in pictures for t in picture(n)), 8, 9] for pictures in TILES]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(6, 3, 24, 24, generator=generator)
    if announced:  # one row of tiles for each prompt, zeros where it has fewer
        pixels = torch.stack([pixels[:4], torch.cat([pixels[4:], torch.zeros(2, 3, 24, 24)])])
    return Tiny(tiny.model, {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels})


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "internvl"])
def test_tiles_of_a_picture_share_its_budget(family):
    tiny = tiled(family)
    encoded = encode(tiny.model, tiny.inputs, {"received"})
    assert encoded.grids == [(3, 3, 3), (1, 3, 3), (2, 3, 3)]
    assert encoded.counts == [27, 9, 18]
    assert encoded.samples == [0, 0, 1]
    assert [len(x) for x in encoded.signals["received"]] == [27, 9, 18]
    reducer = create("random")
    expected = tiny.model.generate(**hide(tiny, tiny.inputs, reducer, 0.4), **GREEDY)
    with attach(tiny.model, reducer, keep=0.4) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert attached.prompt_map.kept == [11, 4, 7]
    tiles = torch.bincount(attached.prompt_map.kept_indices[0] // 9, minlength=3).tolist()
    assert sum(tiles) == 11
    assert len(set(tiles)) > 1, "an equal share of each tile would be another budget"
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, expected.logits, strict=True)) < TOLERANCE
    with attach(tiny.model, reducer, keep=9) as attached:  # a count is a picture's, not a tile's
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert attached.prompt_map.kept == [9, 9, 9]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_with_newlines_share_their_pictures_budget(family):
    tiny = build(family)
    tiles = (tiny.inputs["pixel_values"].shape[1], 36)
    with attach(tiny.model, "grid", keep=30) as attached:
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert attached.prompt_map.kept == [30, 30, 30]
    assert all(36 < count <= tiles[0] * 36 + 12 for count in attached.prompt_map.total)
    assert all(
        bool((kept_indices >= 36).any()) and bool((kept_indices < 36).any())
        for kept_indices in attached.prompt_map.kept_indices
    )


def test_crops_of_gemma3_are_pictures_of_their_own():
    """Its prompts write words between an image and its crops, as between any two images."""
    tiny = build("gemma3")
    with attach(tiny.model, "random", keep=4) as attached:
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert attached.prompt_map.kept == [4, 4, 4]
    assert attached.prompt_map.grids == [(1, 3, 3)] * 3
