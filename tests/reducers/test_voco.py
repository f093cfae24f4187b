"""Learned tokens that read pictures: two passes equal one masked pass, words keep their weights, digests are reused."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from families import build, one

from lit_reduce.backbones import Backbone
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach
from lit_reduce.tokens import VisualTokens

TOLERANCE, KEEP = 1e-4, 3
CELLS = {  # of 6 x 6 tokens: the centre, first row, rows, first column, columns
    1: [(14, 0, 6, 0, 6)],
    3: [(8, 0, 3, 0, 6), (25, 3, 3, 0, 3), (28, 3, 3, 3, 3)],
    4: [(7, 0, 3, 0, 3), (10, 0, 3, 3, 3), (25, 3, 3, 0, 3), (28, 3, 3, 3, 3)],
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def made_voco(model: Any, **options: Any) -> Reducer:
    attention = model.get_decoder().layers[0].self_attn
    sizes = {"query_size": attention.q_proj.out_features, "key_size": attention.k_proj.out_features}
    reducer = create("voco", **{"hidden_size": 32, "depth": 5, "tokens": 4, "rank": 3, **sizes, **options}).eval()
    generator = torch.Generator().manual_seed(2)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.5, generator=generator)
    return reducer


def single(tiny: Any, rows: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Prompts with one picture each, of unequal lengths, padded on the left."""
    ids, mask = tiny.inputs["input_ids"], tiny.inputs["attention_mask"]
    picture = ids[1][ids[1] == tiny.token]
    words = [torch.tensor([1, 7]), torch.tensor([11, 12, 13]), torch.tensor([1, 7]), torch.tensor([9])]
    prompts = [torch.cat([words[0], picture, words[1]]), torch.cat([words[2], picture, words[3]])]
    prompts = [prompts[row] for row in rows]
    longest = max(map(len, prompts)) + 1
    pad = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(x, (n, 0)) for x, n in zip(prompts, pad, strict=True)]),
        "attention_mask": torch.stack([mask.new_ones(longest).index_fill(0, torch.arange(n), 0) for n in pad]),
        "pixel_values": tiny.inputs["pixel_values"][1:][list(rows)],
    }


@contextmanager
def updated(model: Any, reducer: Reducer, learned: torch.Tensor) -> Iterator[None]:
    """Every attention map adds the update at learned rows, one row at a time."""

    def add(number: int, part: str, _: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        for b, n in learned.nonzero().tolist():
            out[b, n] += reducer.up[part][number] @ (reducer.down[part][number] @ args[0][b, n])
        return out

    handles = [
        getattr(layer.self_attn, f"{part}_proj").register_forward_hook(partial(add, number, part))
        for number, layer in enumerate(model.get_decoder().layers)
        for part in "qkvo"
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_one_pass(tiny: Any, inputs: dict[str, Any], reducer: Reducer, keep: int, answer: torch.Tensor) -> torch.Tensor:
    """Logits of prompt and answer from a single pass: learned tokens between picture and words, a mask for each row.

    Returns:
        ``[B, T, V]`` of the last words of the prompt and all of the answer.
    """
    model = tiny.model
    ids = torch.cat([inputs["input_ids"], answer], 1)
    real = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    embeds, rows, learned, places, sees = model.get_input_embeddings()(ids), [], [], [], []
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    for b in range(len(ids)):
        image = (inputs["input_ids"][b] == tiny.token).nonzero()[:, 0]  # an answer may say it, too
        x = embeds[b].index_copy(0, image, features[b])
        cut = int(image[-1]) + 1
        start, stands = reducer.tokens[:keep], image[-keep:]
        if reducer.config.pooled:
            parts = [features[b].view(6, 6, -1)[r : r + h, c : c + w].flatten(0, 1) for _, r, h, c, w in CELLS[keep]]
            start = start + torch.stack([part.mean(0) for part in parts])
            stands = image[[cell[0] for cell in CELLS[keep]]]
        rows.append(torch.cat([x[:cut], start, x[cut:]]))
        position = (real[b].cumsum(0) - 1).clamp(min=0)
        places.append(torch.cat([position[:cut], position[stands], position[cut:]]))
        kind = ["image" if i in image.tolist() else "word" if real[b, i] else "pad" for i in range(ids.shape[1])]
        kind[cut:cut] = ["learned"] * keep
        learned.append([k == "learned" for k in kind])
        see = torch.zeros(len(kind), len(kind), dtype=torch.bool)
        for q in range(len(kind)):
            for k in range(q + 1):
                behind = q >= cut + keep
                see[q, k] = kind[k] != "pad" and not (behind and kind[k] == "image")
            see[q, q] = True
        sees.append(see)
    mask = torch.zeros(len(ids), 1, *sees[0].shape).masked_fill(~torch.stack(sees)[:, None], -1e30)
    with updated(model, reducer, torch.tensor(learned)):
        hidden = model.get_decoder()(
            inputs_embeds=torch.stack(rows), attention_mask=mask, position_ids=torch.stack(places), use_cache=False
        ).last_hidden_state
    return model.lm_head(hidden[:, -answer.shape[1] - 1 :])


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("keep", [1, KEEP, 4])
@torch.no_grad()
def test_two_passes_equal_one_masked_pass(keep: int, pooled: bool) -> None:
    tiny = build("llava")
    inputs, reducer = single(tiny), made_voco(tiny.model, pooled=pooled)
    plain = tiny.model.generate(**inputs, **GREEDY)
    with attach(tiny.model, reducer, keep=keep) as attached:
        out = tiny.model.generate(**inputs, **GREEDY)
        whole = tiny.model(**inputs).logits
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = in_one_pass(tiny, inputs, reducer, keep, answer)
    for step, logits in enumerate(out.logits):
        assert float((logits - expected[:, step]).abs().max()) < TOLERANCE
    assert float((whole[:, -1] - expected[:, 0]).abs().max()) < TOLERANCE
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, plain.logits, strict=True)) > 0.1
    assert (attached.stats.kept, attached.stats.total) == (2 * keep, 72)
    assert attached.stats.reducer_ms > 0


MODES = {
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "eager": {},
}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_modes_of_generate(mode: str) -> None:
    tiny = build("llava", "eager" if mode == "eager" else "sdpa")
    inputs, reducer = single(tiny), made_voco(tiny.model)
    with attach(tiny.model, reducer, keep=KEEP):
        out = tiny.model.generate(**inputs, **GREEDY | MODES[mode])
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = in_one_pass(tiny, inputs, reducer, KEEP, answer)
    for step, logits in enumerate(out.logits):
        assert float((logits - expected[:, step]).abs().max()) < TOLERANCE


@torch.no_grad()
def test_beams_batches_and_prompt_lookup() -> None:
    tiny = build("llava")
    inputs, reducer = single(tiny), made_voco(tiny.model)
    with attach(tiny.model, reducer, keep=KEEP):
        greedy = tiny.model.generate(**inputs, **GREEDY)
        together = tiny.model.generate(**inputs, **GREEDY, num_beams=3, output_scores=True)
        for row in range(2):
            alone = single(tiny, (row,))
            beams = tiny.model.generate(**alone, **GREEDY, num_beams=3, output_scores=True)
            assert torch.equal(beams.sequences[0, -4:], together.sequences[row, -4:])
            assert float((beams.sequences_scores - together.sequences_scores[row]).abs().max()) < TOLERANCE
            guessed = tiny.model.generate(**alone, **GREEDY, prompt_lookup_num_tokens=2)
            for a, b in zip(greedy.logits, guessed.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "mistral3"])
@torch.no_grad()
def test_other_families_hide_the_picture_and_keep_their_words(family: str) -> None:
    """Nothing written out by hand here: words before the picture are the plain model's, and the picture matters."""
    tiny = build(family)
    inputs = one(tiny, 1)
    reducer = made_voco(tiny.model)
    plain = tiny.model(**inputs).logits
    with attach(tiny.model, reducer, keep=KEEP):
        logits = tiny.model(**inputs).logits
        out = tiny.model.generate(**inputs, **GREEDY)
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0, -1)}
        moved = tiny.model(**other).logits
    first = int((inputs["input_ids"][0] == tiny.token).nonzero()[0])
    real = inputs["attention_mask"][0].bool()
    assert float((logits - plain)[0, :first][real[:first]].abs().max()) < TOLERANCE
    assert float((logits - plain)[0, -1].abs().max()) > 0.05
    assert float((logits - moved)[0, -1].abs().max()) > 1e-3, "the picture reaches the words through the tokens alone"
    assert float((out.logits[0][0] - logits[0, -1]).abs().max()) < TOLERANCE


@torch.no_grad()
def test_a_digest_serves_many_questions_without_the_tower() -> None:
    tiny = build("llava")
    inputs, reducer = single(tiny), made_voco(tiny.model)
    calls: list[int] = []
    tiny.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with attach(tiny.model, reducer, keep=KEEP) as attached:
        expected = tiny.model.generate(**inputs, **GREEDY)
        told = attached.digest(**inputs)
        count = len(calls)
        words = {name: x for name, x in inputs.items() if name != "pixel_values"}
        for given in (inputs, words):
            out = tiny.model.generate(**given, **GREEDY, digest=told)
            assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
        assert torch.equal(tiny.model(**words, digest=told).logits, tiny.model(**words, digest=told).logits)
        assert len(calls) == count
        one_picture = attached.digest(**single(tiny, (0,)))
        both = tiny.model.generate(**words, **GREEDY, digest=one_picture)  # two questions about the first picture
        for a, b in zip(both.logits, expected.logits, strict=True):
            assert float((a[0] - b[0]).abs().max()) < TOLERANCE
        assert float((both.logits[0][1] - expected.logits[0][1]).abs().max()) > 1e-3
        more = {**words, "input_ids": words["input_ids"].clone()}
        more["input_ids"][words["input_ids"] == 7] = 8
        with pytest.raises(UserError, match="behind other words"):
            tiny.model.generate(**more, **GREEDY, digest=told)


@torch.no_grad()
def test_a_second_turn_without_a_new_picture() -> None:
    tiny = build("llava")
    inputs, reducer = single(tiny), made_voco(tiny.model)
    more = torch.tensor([[11, 12], [14, 15]])
    with attach(tiny.model, reducer, keep=KEEP):
        first = tiny.model.generate(**inputs, **GREEDY)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        cached = tiny.model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        again = tiny.model.generate(ids, attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY)
    for a, b in zip(cached.logits, again.logits, strict=True):
        assert float((a - b).abs().max()) < TOLERANCE


def test_what_cannot_be_right_is_refused(tiny: Backbone, batch: dict[str, Any]) -> None:
    reducer = made_voco(tiny.model)
    with attach(tiny.model, reducer, keep=KEEP):
        with pytest.raises(UserError, match="exactly one picture in each prompt"):
            tiny.model.generate(**batch, **GREEDY)
        with pytest.raises(UserError, match="prefill_chunk_size"):
            tiny.model.generate(**single(build("llava")), **GREEDY, prefill_chunk_size=8)
    with pytest.raises(UserError, match="4 learned tokens"):
        attach(tiny.model, reducer, keep=5)
    with pytest.raises(UserError, match="attach it alone"):
        attach(tiny.model, [reducer, "grid"], keep=[3, 9])
    with pytest.raises(UserError, match="key_size=16"):
        attach(tiny.model, made_voco(tiny.model, key_size=8), keep=3)
    with pytest.raises(UserError, match="see what comes behind them"):
        attach(build("paligemma").model, reducer, keep=3)
    with attach(tiny.model, "grid", keep=9) as attached, pytest.raises(UserError, match="such as voco"):
        attached.digest(**batch)
    assert not any(layer.self_attn.q_proj._forward_hooks for layer in tiny.model.get_decoder().layers)


def test_fewer_tokens_are_the_first_of_more() -> None:
    tokens = VisualTokens(torch.randn(2, 24, 6), (1, 4, 6), {}, 0)
    reducer = create("voco", hidden_size=6, depth=2, tokens=8, pooled=False)
    few, many = reducer(tokens, 3), reducer(tokens, 8)
    assert few.kept_indices.tolist() == [[21, 22, 23]] * 2
    assert torch.equal(few.features, many.features[:, :3])
    with pytest.raises(UserError, match="8 learned tokens"):
        reducer(tokens, 9)
