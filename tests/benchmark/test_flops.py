"""Counted from sizes against torch's own counter on real forward passes."""

import pytest
import torch
from families import FAMILIES, build, one

from lit_reduce.backbones import family_of, shapes
from lit_reduce.benchmark import flops as cost
from lit_reduce.benchmark.profiling import ModuleFlops, flop_counter
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach
from lit_reduce.tokens import Reduction

PICTURES = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
EXACT_TOWERS = ("llava", "qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3", "internvl", "paligemma", "mistral3")
CLOSE = 2e-3  # the counter also sees the small products that make rotary tables


def counted(run):
    """FLOPs that torch counts, and what ``run`` returned."""
    with torch.no_grad(), flop_counter() as counter:
        out = run()
    return counter.get_total_flops(), out


class Halving(Reducer):
    """Announces stages; its site and kind are set by the test."""

    name = "halving"

    def stages(self, depth, tokens, keep):
        return {1: tokens // 2, 3: keep}


def halving(site, kind="select"):
    reducer = Halving()
    reducer.site, reducer.kind = site, kind
    return reducer


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_of_every_family(name):
    tiny = build(name)
    model, inputs = tiny.model, one(tiny, 1)
    length = inputs["input_ids"].shape[1]
    lengths = [length] * cost.decoder_depth(model)
    seen = {k: v for k, v in inputs.items() if k in PICTURES}
    with torch.no_grad():
        features = model.base_model.get_image_features(**seen, return_dict=True)
    words = {k: v for k, v in inputs.items() if k not in PICTURES}
    given = {**words, "mm_encoder_outputs": {"image": features}, "use_cache": True, "logits_to_keep": 1}
    flops, out = counted(lambda: model(**given))
    assert cost.prefill_flops(model, lengths) == pytest.approx(flops, rel=CLOSE)
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, length + 1, dtype=torch.long)}
    flops, out = counted(lambda: model(**step, past_key_values=out.past_key_values, use_cache=True))
    # Gemma3's sliding layers forget keys, which the price does not know.
    assert cost.decode_flops(model, lengths) == pytest.approx(flops, rel=5e-2 if name == "gemma3" else CLOSE)


@pytest.mark.parametrize("name", EXACT_TOWERS)
def test_tower_and_projector(name):
    tiny = build(name)
    model, inputs = tiny.model, tiny.inputs
    seen = {k: v for k, v in inputs.items() if k in PICTURES}
    flops, _ = counted(lambda: model.base_model.get_image_features(**seen))
    assert sum(cost.encoder_flops(model, inputs)) == pytest.approx(flops, rel=CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_cached_bytes_are_those_of_the_cache(name):
    tiny = build(name)
    inputs = one(tiny, 1)
    with torch.no_grad():
        cache = tiny.model(**inputs, use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    lengths = [inputs["input_ids"].shape[1]] * len(cache.layers)
    assert cost.kv_bytes(tiny.model, lengths) == held


def test_a_batch_and_a_shorter_prompt_are_priced_as_they_run():
    model = build("llava").model
    inputs = shapes.example(model, 3, 36, 6)
    whole = cost.price(model, inputs)
    less = cost.price(model, inputs, halving("projector"), keep=9, reducer_flops=11)
    assert whole.prefill == cost.prefill_flops(model, [42] * 5, 3)
    assert less.prefill == cost.prefill_flops(model, [15] * 5, 3)
    assert less.decode == cost.decode_flops(model, [15] * 5, 3)
    assert (less.tower, less.projector, less.reducer) == (whole.tower, whole.projector, 11)
    assert less.first_token == whole.tower + whole.projector + 11 + less.prefill
    assert whole.kv_bytes == 3 * 5 * 42 * 2 * 16 * 4


def test_layers_see_what_stages_say():
    model, tokens, keep = build("llava").model, 36, 9
    inputs = shapes.example(model, 1, tokens, 6)
    assert cost.layer_tokens(model, inputs, halving("decoder"), keep).decoder == [36, 18, 18, 9, 9]
    assert cost.layer_tokens(model, inputs, halving("decoder", "skip"), keep).decoder == [36, 18, 36, 9, 36]
    assert cost.layer_tokens(model, inputs, halving("cache"), keep).cached == [36, 18, 36, 9, 36]
    assert cost.layer_tokens(model, inputs, halving("cache"), keep).decoder == [36] * 5
    assert cost.layer_tokens(model, inputs, halving("encoder"), keep, arrived=36).decoder == [36] * 5
    assert cost.layer_tokens(model, inputs, halving("decoder"), tokens).decoder == [36] * 5


def test_tokens_that_read_the_picture_inside_the_decoder_save_no_prefill():
    model = build("llava").model
    inputs = shapes.example(model, 1, 36, 6)
    reducer = create("voco", hidden_size=32, depth=5, key_size=16, tokens=4, rank=0).requires_grad_(False)
    priced = cost.price(model, inputs, reducer, keep=4)
    with attach(model, reducer, keep=4):
        flops, _ = counted(lambda: model(**inputs, logits_to_keep=1))
    assert priced.first_token == pytest.approx(flops, rel=0.02)
    assert priced.prefill > cost.price(model, inputs).prefill
    assert priced.decode == cost.decode_flops(model, [10] * 5)
    assert priced.kv_bytes == cost.kv_bytes(model, [10] * 5)


def test_a_dropping_decoder_saves_in_the_layers_behind_and_an_evictor_only_later():
    model = build("llava").model
    inputs = shapes.example(model, 1, 36, 6)
    dropped = cost.price(model, inputs, halving("decoder"), keep=9)
    evicted = cost.price(model, inputs, halving("cache"), keep=9)
    assert dropped.prefill == cost.prefill_flops(model, [42, 24, 24, 15, 15])
    assert evicted.prefill == cost.price(model, inputs).prefill
    assert evicted.kv_bytes == cost.kv_bytes(model, [42, 24, 42, 15, 42])


class Spread(Reducer):
    """Keeps every few tokens at two blocks, without arithmetic that torch would count."""

    name, kind, site = "spread", "select", "encoder"

    def stages(self, depth, tokens, keep):
        return {0: (tokens + keep) // 2, depth - 1: keep}

    def reduce(self, tokens, keep):
        return Reduction((torch.arange(keep) * tokens.count // keep).expand(len(tokens.features), -1))


@pytest.mark.parametrize("point", ["before", "attention"])
@pytest.mark.parametrize("name", ["llava", "paligemma", "smolvlm", "internvl", "qwen2_vl", "mistral3"])
def test_a_reduced_tower_costs_what_torch_counts(name, point):
    """One picture; short for good (LLaVA, PaliGemma), restored, and packed."""
    tiny = build(name)
    model, inputs = tiny.model, one(tiny, 1)
    seen = {k: v for k, v in inputs.items() if k in PICTURES}
    reducer = Spread()
    reducer.point = point
    row = family_of(model.config).row(model)
    keep = 4 if row is not None else 16  # visual tokens of a packed tower, patches of others
    whole = sum(cost.encoder_flops(model, inputs))
    with attach(model, reducer, keep=keep):
        flops, _ = counted(lambda: model.base_model.get_image_features(**seen))
    priced = sum(cost.encoder_flops(model, inputs, reducer, keep))
    assert priced == pytest.approx(flops, rel=CLOSE)
    assert priced < 0.9 * whole


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_registers_cost_the_tower_their_own_rows(name):
    """A falcon without updates of its own, so that it pools behind the projector: no matrix products."""
    tiny = build(name)
    options = {"hidden_size": 32, "vision_hidden_size": 24, "blocks": 3, "rank": 0, "projector_rank": 0, "reatten": 0}
    reducer = create("falcon", **options).requires_grad_(False)
    seen = {k: v for k, v in tiny.inputs.items() if k in PICTURES}
    plain, _ = counted(lambda: tiny.model.base_model.get_image_features(**seen))
    with attach(tiny.model, reducer, keep=12):
        flops, _ = counted(lambda: tiny.model.base_model.get_image_features(**seen))
    before = sum(cost.encoder_flops(tiny.model, tiny.inputs))
    more = sum(cost.encoder_flops(tiny.model, tiny.inputs, reducer, 12)) - before
    assert more == pytest.approx(flops - plain, rel=CLOSE)
    assert more > 0.1 * before


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_tome_and_evit_cost_what_torch_counts_beside_their_own_work(name):
    model = build("llava").model
    inputs = shapes.example(model, 1, 36, 6)
    reducer = create(name)
    priced = cost.price(model, inputs, reducer, 11)
    with attach(model, reducer, keep=11), ModuleFlops(reducer) as own:
        flops, _ = counted(lambda: model(**inputs, logits_to_keep=1))
    reading = 3 * 37 * 4 * 24 if name == "evit" else 0  # at most: CLS's row in three blocks, which the tap computes
    assert own.total < flops
    assert priced.first_token + own.total <= flops <= (priced.first_token + own.total + reading) * (1 + CLOSE)
    assert cost.price(model, inputs, reducer, 11).tower < 0.8 * cost.price(model, inputs).tower
    assert cost.price(model, inputs, reducer, 11).projector * 36 == cost.price(model, inputs).projector * 11


def test_looking_back_costs_what_torch_counts_beside_the_short_stream():
    model = build("llava").model
    inputs = shapes.example(model, 1, 36, 6)
    reducer = create("flexattention", hidden_size=32, depth=5, key_size=16, rank=8, first=2, threshold=-1.0)
    priced = cost.price(model, inputs, reducer, 9)
    with attach(model, reducer, keep=9), ModuleFlops(reducer) as own:
        flops, _ = counted(lambda: model(**inputs, logits_to_keep=1))
    # Three layers make 36 keys and values of what the trunk left, and compare one query with the keys.
    assert own.total == 2 * 36 * (32 * 8 + 3 * (8 * 32 + 2 * 32))
    rows = 4 * (2 * 15 * 32)  # of attention, to rank by and to weigh against, in four layers: the runtime's own
    assert flops == pytest.approx(priced.first_token + own.total + rows, rel=CLOSE)
    assert cost.price(model, inputs, reducer, 9).prefill == cost.price(model, inputs, create("pool"), 9).prefill


def test_an_encoder_reducer_cheapens_the_tower_from_its_block_on():
    """LLaVA's tower of four blocks, one CLS token and 36 patches; by hand from the widths of its config."""
    model = build("llava").model
    inputs = shapes.example(model, 1, 36, 6)
    attention, mlp = 4 * 24 * 24, 2 * 24 * 32
    patches = 2 * 36 * 24 * 3 * 4 * 4

    def block(before, after):
        return 2 * attention * (before + 1) + 4 * 24 * (before + 1) ** 2 + 2 * mlp * (after + 1)

    reducer = halving("encoder")
    reducer.stages = lambda depth, tokens, keep: {1: tokens // 2, depth - 1: keep}  # the last block feeds nothing
    expected = patches + block(36, 36) + block(18, 18) + block(9, 9) * 2
    assert cost.encoder_flops(model, inputs, reducer, 9)[0] == expected
    reducer.point = "attention"
    expected = patches + block(36, 36) + block(36, 18) + block(18, 9) + block(9, 9)
    assert cost.encoder_flops(model, inputs, reducer, 9)[0] == expected
    assert cost.price(model, inputs, reducer, 9, arrived=36).prefill == cost.price(model, inputs).prefill
    assert cost.price(model, inputs, reducer, 9, arrived=9).prefill == cost.prefill_flops(model, [15] * 5)
