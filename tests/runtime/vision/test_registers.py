"""Registers in the tower equal a slow one, in double precision, in which a mask hides them from the patches."""

import pytest
import torch
from families import build, one
from masked_tower import Slow

from lit_reduce.backbones.families import family_of
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.ops.cells import cells
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach, encode
from lit_reduce.runtime.vision.base import installed
from lit_reduce.runtime.vision.registers import Registers
from lit_reduce.runtime.vision.site import tower_hooks
from lit_reduce.tokens import Budget, VisualTokens

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
WHOLE, TILED = ["llava", "paligemma"], ["llava_next", "llava_onevision"]
KEEP = 5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def falcon(tiny, seed: int | None = 3, **options) -> Reducer:
    """As wide and deep as the tiny model's tower; its weights large enough that all of them show, or fresh ones."""
    tower = tower_of(tiny.model)
    sizes = {"hidden_size": 32, "vision_hidden_size": 24, "blocks": tower.depth, "start": 0.34}
    reducer = create(
        "falcon", **{**sizes, "table": 3, "rank": 4, "projector_rank": 5, "reatten": 6, "heads": 2} | options
    )
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for weight in reducer.parameters():
            weight.normal_(0, 0.4, generator=generator)
    return reducer.eval()


def enter(model, inputs, **keys):
    """What the first block gets, what the projector gave, and the pictures."""
    seen = {}
    hooks = [
        tower_of(model).blocks[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        model.base_model.multi_modal_projector.register_forward_hook(lambda *_: seen.update(out=_[-1])),
    ]
    encoded = encode(model, inputs, **keys)
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["out"], encoded


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "trained"), [("llava", True), ("llava_next", True), ("llava", False)])
def test_registers_equal_a_masked_tower(family, kernel, trained):
    """Untrained and without help behind the projector they are the mean of their cell, carried on."""
    tiny = build(family, kernel)
    reducer = falcon(tiny) if trained else falcon(tiny, None, mix=1.0)
    slow = Slow(tiny, reducer, KEEP)
    with attach(tiny.model, reducer, keep=KEEP):
        first, out, encoded = enter(tiny.model, tiny.inputs)
    layout = family_of(tiny.model.config).layouts["image"]
    counts = layout.tiles(tiny.model, tiny.inputs) if family == "llava_next" else [1] * len(first)
    prefix = first.shape[1] - 36
    assert (family == "llava_next") == (max(counts) > 1)
    for tiles, made in zip(first.split(counts), out.split(counts), strict=True):
        expected, kept_indices = slow(tiles)
        mine = made if family == "llava" else made[:, kept_indices]
        assert float((mine - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
        plain, _ = Slow(tiny, falcon(tiny, None, mix=float(trained)), KEEP)(tiles)
        assert float((expected - plain).abs().max()) > 0.1, "what is learned must show, or this proves nothing"
    assert prefix == 1
    assert all(len(x) == len(a) for x, a in zip(encoded.features, encoded.kept_indices, strict=True))


@pytest.mark.parametrize("family", WHOLE)
def test_untrained_tokens_are_average_pooling(family):
    tiny = build(family)
    plain = torch.stack(encode(tiny.model, tiny.inputs).features)
    with attach(tiny.model, falcon(tiny, None), keep=KEEP):
        encoded = encode(tiny.model, tiny.inputs)
    pool = create("pool")(VisualTokens(plain, (1, 6, 6)), KEEP)
    torch.testing.assert_close(torch.stack(encoded.features), pool.features, atol=1e-6, rtol=1e-5)
    assert torch.equal(torch.stack(encoded.kept_indices), pool.kept_indices)


@pytest.mark.parametrize("family", [*WHOLE, *TILED])
def test_patches_are_bit_identical_and_one_pass_gives_both(family):
    tiny = build(family)
    plain = encode(tiny.model, tiny.inputs, {"encoder@1", "cls"} if family == "llava" else {"encoder@1"})
    _, projected, _ = enter(tiny.model, tiny.inputs)
    with attach(tiny.model, falcon(tiny), keep=KEEP):
        encoded = encode(tiny.model, tiny.inputs, set(plain.signals))
        teacher = installed(tiny.model).teacher
    assert torch.equal(teacher, projected)
    for name, rows in plain.signals.items():
        for whole, left, kept_indices in zip(rows, encoded.signals[name], encoded.kept_indices, strict=True):
            assert torch.equal(whole[kept_indices], left), name


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_tokens_stand_where_their_cells_are(family):
    tiny = build(family)
    with attach(tiny.model, falcon(tiny), keep=KEEP) as attached:
        encoded = encode(tiny.model, tiny.inputs, {"size"})
        handle = installed(tiny.model)
        tiny.model.generate(**tiny.inputs, **GREEDY)
        kept = attached.stats.kept
    plain = encode(tiny.model, tiny.inputs)
    assert encoded.counts == plain.counts
    assert kept == sum(len(x) for x in encoded.features) < sum(plain.counts)
    for kept_indices, owner, size in zip(encoded.kept_indices, handle.owners, encoded.signals["size"], strict=True):
        assert torch.equal(owner[kept_indices], torch.arange(len(kept_indices))), "an anchor is in its own cell"
        assert torch.equal(size, torch.stack([(owner == i).sum() for i in range(len(kept_indices))]).float())
    if family == "llava":
        assert all(torch.equal(a, cells((1, 6, 6), 36, KEEP)[0]) for a in encoded.kept_indices)
    else:  # the overview comes first; newlines belong to nobody, and no tile is lost
        assert all(torch.equal(a[:KEEP], cells((1, 6, 6), 36, KEEP)[0]) for a in encoded.kept_indices)
        assert (torch.cat(handle.owners) < 0).any()
        assert len(encoded.kept_indices[1]) == 5 * KEEP


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "paligemma"])
def test_a_batch_equals_its_samples_and_nothing_stays_behind(family):
    tiny = build(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    state = {id(module): dict(vars(module)) for module in tiny.model.modules()}
    with attach(tiny.model, falcon(tiny), keep=KEEP) as attached:
        together = tiny.model.generate(**tiny.inputs, **GREEDY)
        assert attached.stats.kept < attached.stats.total
        assert attached.stats.reducer_ms > 0
        for row in range(2):
            alone = tiny.model.generate(**one(tiny, row), **GREEDY)
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) < TOLERANCE
    again = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(together.logits, plain.logits, strict=True)) > 0.1
    assert installed(tiny.model) is None
    assert all("forward" not in vars(module) for module in tiny.model.modules() if "forward" not in state[id(module)])


def test_it_equals_hiding_what_is_dropped_behind_given_features():
    """Beams too: the full prompt with registers at their anchors, the mask hiding everything else."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tiny = build("llava")
    ids, mask = tiny.inputs["input_ids"], tiny.inputs["attention_mask"]
    with attach(tiny.model, falcon(tiny), keep=KEEP):
        encoded = encode(tiny.model, tiny.inputs)
        mine = tiny.model.generate(**tiny.inputs, **GREEDY, num_beams=3)
    whole = [
        torch.zeros(36, 32).index_copy(0, a, x) for a, x in zip(encoded.kept_indices, encoded.features, strict=True)
    ]
    stays = torch.cat([torch.zeros(36, dtype=torch.bool).index_fill(0, a, True) for a in encoded.kept_indices])
    hidden = {
        "input_ids": ids, "attention_mask": mask.bool().masked_scatter(ids == tiny.token, stays).long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=whole)},
    }  # fmt: skip
    expected = tiny.model.generate(**hidden, **GREEDY, num_beams=3)
    assert torch.equal(mine.sequences, expected.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(mine.logits, expected.logits, strict=True)) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keeping_all_changes_no_bit(family):
    tiny = build(family)
    plain = encode(tiny.model, tiny.inputs).features
    with attach(tiny.model, falcon(tiny), keep=1.0):
        encoded = encode(tiny.model, tiny.inputs)
        assert encoded.kept_indices == []
        assert all(torch.equal(a, b) for a, b in zip(encoded.features, plain, strict=True))


def test_a_tile_alone_is_as_without_reatten():
    """A LLaVA-NeXT picture of one tile does not exist, so the tiles are taken for pictures."""
    tiny = build("llava_next")
    outputs = []
    for options in ({}, {"reatten": 0}):
        reducer = falcon(tiny, None, **options)
        for name, weight in reducer.named_parameters():
            weight.copy_(
                torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight).sin() if "between" not in name else 1
            )
        handle = tower_hooks(tiny.model, family_of(tiny.model.config), reducer, Budget(KEEP)).install()
        x = {"pixel_values": tiny.inputs["pixel_values"], "image_sizes": tiny.inputs["image_sizes"]}
        outputs.append(tiny.model.base_model.get_image_features(**x, return_dict=True).pooler_output)
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_gradients_reach_the_reducer_alone():
    from lit_reduce.runtime.encode import trace

    tiny = build("llava_next")
    tiny.model.requires_grad_(False)
    reducer = falcon(tiny)
    handle = tower_hooks(tiny.model, family_of(tiny.model.config), reducer, Budget(KEEP)).install()
    with torch.enable_grad():
        torch.cat(trace(tiny.model, tiny.inputs).features).square().mean().backward()
    handle.remove()
    assert all(weight.grad is not None and float(weight.grad.abs().max()) > 0 for weight in reducer.parameters())
    assert all(weight.grad is None for weight in tiny.model.parameters())
    with attach(tiny.model, reducer, keep=KEEP), torch.enable_grad():
        assert not encode(tiny.model, tiny.inputs).features[0].requires_grad


def test_reducers_behind_it_get_what_is_left():
    tiny = build("llava")
    with attach(tiny.model, [falcon(tiny), create("fastervlm"), "fastv"], keep=[12, 8, 4]) as attached:
        tiny.model.generate(**tiny.inputs, **GREEDY)
        left = encode(tiny.model, tiny.inputs).kept_indices
    assert attached.stats.total == 108
    assert attached.stats.kept == 12
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(attached.prompt_map.kept_indices, left, strict=True))


def patches_see_registers(monkeypatch):
    right = Registers._leave

    def wrong(self, out):
        return right(self, out + self.rows.mean(1, keepdim=True))

    monkeypatch.setattr(Registers, "_leave", wrong)


def registers_see_themselves_alone(monkeypatch):
    right = Registers._pass
    monkeypatch.setattr(
        Registers,
        "_pass",
        lambda self, n, plain, seen, *a, **k: right(self, n, plain, [x[:, :, :0] for x in seen], *a, **k),
    )


def all_tiles_are_one_image(monkeypatch):
    right = Registers._attention

    def wrong(self, *args, **kwargs):
        self.tiles = [sum(self.tiles)]
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Registers, "_attention", wrong)


def updates_reach_patches(monkeypatch):
    def wrong(self, number, name, plain, x, *args, **kwargs):
        return self.reducer.adapt(number, name, x, plain(x, *args, **kwargs))

    monkeypatch.setattr(Registers, "_part", wrong)


MUTATIONS = [
    (patches_see_registers, lambda: test_patches_are_bit_identical_and_one_pass_gives_both("llava")),
    (registers_see_themselves_alone, lambda: test_registers_equal_a_masked_tower("llava", "eager", True)),
    (all_tiles_are_one_image, lambda: test_registers_equal_a_masked_tower("llava_next", "sdpa", True)),
    (updates_reach_patches, lambda: test_patches_are_bit_identical_and_one_pass_gives_both("llava")),
]


@pytest.mark.parametrize(("mutate", "check"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_the_comparisons_notice(mutate, check, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_what_cannot_be_served_is_refused():
    for family in ("qwen2_5_vl", "smolvlm", "internvl", "gemma3", "mistral3"):
        tiny = build(family)
        with pytest.raises(UserError, match="adds registers to the vision tower, but"):
            attach(tiny.model, create("falcon", hidden_size=32, vision_hidden_size=24, blocks=3), keep=KEEP)
        assert installed(tiny.model) is None
        assert "generate" not in vars(tiny.model)
    tiny = build("llava")
    with (
        pytest.raises(UserError, match="3 blocks of this vision tower"),
        attach(tiny.model, falcon(tiny, blocks=5), keep=KEEP),
    ):
        encode(tiny.model, tiny.inputs)
    wide = falcon(tiny, None, vision_hidden_size=20)
    with pytest.raises(UserError, match="24 wide, but"), attach(tiny.model, wide, keep=KEEP):
        encode(tiny.model, tiny.inputs)
    tiny.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UserError, match="reads CLS as a patch"):
        attach(tiny.model, falcon(tiny))
    video = build("llava_onevision_video")
    with pytest.raises(UserError, match="leave videos out"), attach(video.model, falcon(video), keep=KEEP):
        video.model.generate(**video.inputs, **GREEDY)


def test_bfloat16():
    """The reducer keeps its own precision; eight bits of mantissa in what it adds to."""
    tiny = build("llava")
    reducer = falcon(tiny)
    with attach(tiny.model, reducer, keep=KEEP):
        exact = torch.cat(encode(tiny.model, tiny.inputs).features)
        model = tiny.model.bfloat16()
        half = torch.cat(
            encode(model, {**tiny.inputs, "pixel_values": tiny.inputs["pixel_values"].bfloat16()}).features
        )
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().mean()) < 0.05 * float(exact.abs().mean())
