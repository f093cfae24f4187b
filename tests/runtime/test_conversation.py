"""A conversation that goes on upon the cache of a shortened prompt equals the one of a model that only hides tokens."""

import copy

import pytest
import torch
from families import VIDEO, build, one

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime import attach
from lit_reduce.tokens import Reduction

TOLERANCE = 1e-4
MORE = torch.tensor([[11, 12, 13], [14, 15, 16]])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def follow(sequences, mask, more=MORE):
    """The caller's next inputs: everything that was returned, and new tokens behind it."""
    ids = torch.cat([sequences, more], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)}


def hidden_turn(model, first, hidden, greedy, more=MORE):
    """The second turn of the plain model: its mask goes on hiding, its positions go on counting."""
    turn = follow(first.sequences, hidden["attention_mask"], more)
    start = hidden["position_ids"].max(1, keepdim=True).values + 1
    count = turn["input_ids"].shape[1] - hidden["input_ids"].shape[1]
    turn["position_ids"] = torch.cat([hidden["position_ids"], start + torch.arange(count)], 1)
    return turn, model.generate(**turn, past_key_values=first.past_key_values, **greedy)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("again", [False, True], ids=["text", "images-again"])
def test_second_and_third_turn(tiny, batch, reducer, reference, helpers, static, again):
    model, greedy, hidden = tiny.model, helpers.greedy, reference(batch, reducer)
    first = model.generate(**hidden, **greedy)
    turn, second = hidden_turn(model, first, hidden, greedy)
    _, third = hidden_turn(model, second, turn, greedy, MORE + 9)
    cache = _static(model) if static else None
    pictures = {"pixel_values": batch["pixel_values"]} if again else {}
    with attach(model, reducer, keep=helpers.keep):
        mine = model.generate(**batch, **greedy, past_key_values=cache)
        turn = follow(mine.sequences, batch["attention_mask"])
        mine_2 = model.generate(**turn, **pictures, past_key_values=mine.past_key_values, **greedy)
        turn = follow(mine_2.sequences, turn["attention_mask"], MORE + 9)
        mine_3 = model.generate(**turn, past_key_values=mine_2.past_key_values, **greedy)
    for a, b in ((mine, first), (mine_2, second), (mine_3, third)):
        assert torch.equal(a.sequences, b.sequences)
        assert helpers.gap(a, b) < TOLERANCE


def _static(model):
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(), max_cache_len=240)


def test_positions_left_to_transformers_would_be_wrong(tiny, batch, uneven, helpers):
    """What the history is for: without it the second turn is silently another one."""
    model = tiny.model
    with attach(model, uneven, keep=helpers.keep) as attached:
        first = model.generate(**batch, **helpers.greedy)
        short, _ = attached.shorten(batch)
        right = model.generate(
            **follow(first.sequences, batch["attention_mask"]),
            past_key_values=copy.deepcopy(first.past_key_values),
            **helpers.greedy,
        )
    new = first.sequences[:, batch["input_ids"].shape[1] :]
    naive = follow(torch.cat([short["input_ids"], new], 1), short["attention_mask"])
    wrong = model.generate(**naive, past_key_values=first.past_key_values, **helpers.greedy)
    assert helpers.gap(right, wrong) > 0.1


def test_second_turn_after_repeated_rows(tiny, batch, uneven, helpers):
    greedy = helpers.greedy | {"do_sample": True, "num_return_sequences": 2, "top_k": 4}
    torch.manual_seed(0)
    with attach(tiny.model, uneven, keep=helpers.keep):
        first = tiny.model.generate(**batch, **greedy)
        mask = batch["attention_mask"].repeat_interleave(2, 0)
        turn = {"input_ids": torch.cat([first.sequences, MORE.repeat_interleave(2, 0)], 1)}
        extra = turn["input_ids"].shape[1] - mask.shape[1]
        turn["attention_mask"] = torch.cat([mask, mask.new_ones(4, extra)], 1)
        cached = tiny.model.generate(**turn, past_key_values=first.past_key_values, **helpers.greedy)
        pixels = batch["pixel_values"][[0, 1, 0, 1, 2, 2]]
        anew = tiny.model.generate(**turn, pixel_values=pixels, **helpers.greedy)
    assert helpers.gap(cached, anew) < TOLERANCE


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("first_image", [True, False], ids=["image-first", "text-first"])
def test_a_new_image_in_the_second_turn(tiny, batch, pictures, uneven, helpers, positions, first_image):
    """Equals the whole conversation from the start; the first turn may even have been without an image."""
    first_inputs = batch if first_image else tiny.prepare([None, None], ["what is the red ?", "w40"])
    image = [3] * 36
    more = torch.tensor([[11, *image, 12], [14, *image, 13]])
    pixels = tiny.prepare([pictures[2], pictures[0]], ["w50", "w50"])["pixel_values"]
    with attach(tiny.model, uneven, keep=helpers.keep, positions=positions):
        first = tiny.model.generate(**first_inputs, **helpers.greedy)
        turn = follow(first.sequences, first_inputs["attention_mask"], more)
        cache = copy.deepcopy(first.past_key_values)
        second = tiny.model.generate(**turn, pixel_values=pixels, past_key_values=cache, **helpers.greedy)
        final = follow(second.sequences, turn["attention_mask"], MORE)
        third = tiny.model.generate(**final, past_key_values=second.past_key_values, **helpers.greedy)
        order = [0, 1, 3, 2, 4] if first_image else [0, 1]
        everything = torch.cat([batch["pixel_values"], pixels])[order] if first_image else pixels
        anew = tiny.model.generate(**turn, pixel_values=everything, **helpers.greedy)
        anew_3 = tiny.model.generate(**final, pixel_values=everything, **helpers.greedy)
    assert helpers.gap(second, anew) < TOLERANCE
    assert helpers.gap(third, anew_3) < TOLERANCE


def test_decoding_by_hand(tiny, batch, uneven, helpers):
    with attach(tiny.model, uneven, keep=helpers.keep):
        expected = tiny.model.generate(**batch, **helpers.greedy)
        out = tiny.model(**batch, use_cache=True)
        mask, steps = batch["attention_mask"], [out.logits[:, -1]]
        while len(steps) < 5:
            token = steps[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            given = mask if len(steps) % 2 else None
            out = tiny.model(input_ids=token, attention_mask=given, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    assert max(float((a - b).abs().max()) for a, b in zip(steps, expected.logits, strict=True)) < TOLERANCE


def test_what_does_not_continue_the_cache_is_refused(tiny, batch, uneven, helpers):
    with attach(tiny.model, uneven, keep=helpers.keep):
        first = tiny.model.generate(**batch, **helpers.greedy)
        cache, ids = first.past_key_values, first.sequences
        with pytest.raises(UserError, match="do not continue"):
            tiny.model.generate(ids.flip(1), past_key_values=cache, **helpers.greedy)
        with pytest.raises(UserError, match="do not continue"):
            tiny.model.generate(batch["input_ids"], past_key_values=cache, **helpers.greedy)
        with pytest.raises(UserError, match="whole conversation"):
            tiny.model(**batch, past_key_values=cache)
        cache.crop(5 - cache.get_seq_length())
        with pytest.raises(UserError, match="cropped"):
            tiny.model.generate(**follow(ids, batch["attention_mask"]), past_key_values=cache, **helpers.greedy)


FOLLOW = {
    "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    "suppress_tokens": [100, 101],
}  # fmt: skip


def visual(inputs):
    return {name: x for name, x in inputs.items() if name.startswith(("pixel", "image_", "video_", "second"))}


def kinds(tiny, ids):
    return {
        name: (ids == tiny.token).long() * (2 if tiny.token == VIDEO else 1)
        for name in tiny.inputs
        if name.endswith("token_type_ids")
    }


def converse(tiny, first, picture, everything, tail):
    """A turn, a turn with a new picture and one of text on the cache, against the same read anew."""
    model = tiny.model
    with attach(model, "random", keep=0.4):
        start = model.generate(**first, **FOLLOW)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, FOLLOW["max_new_tokens"]), value=1)
        ids = torch.cat([start.sequences, tail], 1)
        turn = {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(tail)], 1)}
        second = model.generate(**turn, **kinds(tiny, ids), **picture, past_key_values=start.past_key_values, **FOLLOW)
        ids = torch.cat([second.sequences, MORE[: len(tail)]], 1)
        mask = torch.nn.functional.pad(turn["attention_mask"], (0, ids.shape[1] - turn["input_ids"].shape[1]), value=1)
        final = {"input_ids": ids, "attention_mask": mask}
        third = model.generate(**final, past_key_values=second.past_key_values, **FOLLOW)
        return [
            (mine, model.generate(**asked, **kinds(tiny, asked["input_ids"]), **everything, **FOLLOW))
            for mine, asked in ((second, turn), (third, final))
        ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "smolvlm", "mistral3"])
def test_a_new_picture_of_any_family(family):
    """In rows of positions that go on where the text stands; equals the conversation read anew."""
    tiny = build(family)
    first, other = one(tiny, 0), one(tiny, 1)
    along = 1 if family == "smolvlm" else 0  # one row of images for each prompt
    joined = {name: torch.cat([x, visual(other)[name]], along) for name, x in visual(first).items()}
    for mine, anew in converse(tiny, first, visual(other), joined, other["input_ids"]):
        assert max(float((a - b).abs().max()) for a, b in zip(mine.logits, anew.logits, strict=True)) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_new_picture_for_each_of_a_padded_batch(family):
    tiny = build(family)
    thw, flat = tiny.inputs["image_grid_thw"], tiny.inputs["pixel_values"]
    pixels = flat.split(thw.prod(1).tolist())

    def chosen(images):
        return {"pixel_values": torch.cat([pixels[i] for i in images]), "image_grid_thw": thw[images]}

    tail = torch.cat([torch.full((2, 8), tiny.token), torch.tensor([[7, 8], [9, 10]])], 1)  # the image of 8 x 4 patches
    pairs = converse(tiny, tiny.inputs, chosen([2, 2]), chosen([0, 1, 2, 2, 2]), tail)
    for mine, anew in pairs:
        assert max(float((a - b).abs().max()) for a, b in zip(mine.logits, anew.logits, strict=True)) < TOLERANCE


def test_a_new_picture_behind_one_that_was_read_whole():
    """The first call was the plain model's; equals both pictures through a reducer that leaves the first one alone."""
    tiny = build("qwen2_5_vl")
    first, other = one(tiny, 0), one(tiny, 1)
    start = tiny.model.generate(**first, **FOLLOW)
    ids = torch.cat([start.sequences, other["input_ids"]], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = {name: torch.cat([x, visual(other)[name]]) for name, x in visual(first).items()}
    with attach(tiny.model, SomeOf(8), keep=3):
        second = tiny.model.generate(**turn, **visual(other), past_key_values=start.past_key_values, **FOLLOW)
    tiny.model.base_model.rope_deltas = None
    with attach(tiny.model, SomeOf(8), keep=3):
        anew = tiny.model.generate(**turn, **kinds(tiny, ids), **both, **FOLLOW)
    assert second.past_key_values.get_seq_length() == anew.past_key_values.get_seq_length() < ids.shape[1]
    assert max(float((a - b).abs().max()) for a, b in zip(second.logits, anew.logits, strict=True)) < TOLERANCE


class SomeOf(Reducer):
    """Drops tokens of pictures that have so many, and of no others."""

    name = "some_of"

    def __init__(self, count):
        super().__init__()
        self.count = count

    def reduce(self, tokens, keep):
        return Reduction(torch.arange(keep if tokens.count == self.count else tokens.count)[None])


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_families_that_look_ahead_refuse_a_new_picture_and_chunks(family):
    tiny = build(family)
    first, other = one(tiny, 0), one(tiny, 1)
    with attach(tiny.model, "random", keep=4):
        start = tiny.model.generate(**first, **FOLLOW)
        ids = torch.cat([start.sequences, other["input_ids"]], 1)
        with pytest.raises(UserError, match="new image cannot follow"):
            tiny.model.generate(ids, **visual(other), past_key_values=start.past_key_values, **FOLLOW)
        with pytest.raises(UserError, match="prefill_chunk_size"):
            tiny.model.generate(**tiny.inputs, prefill_chunk_size=8, **FOLLOW)
