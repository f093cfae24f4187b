"""A reduced tower that packs its images equals a slow one over the whole row, whose masks hide the same patches."""

import pytest
import torch
import transformers as hf
from families import IMAGE, TEXT, Tiny, build

from lit_reduce.backbones.families import Picture, family_of
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach, encode
from lit_reduce.runtime.vision.base import installed
from lit_reduce.runtime.vision.packed import Row
from lit_reduce.runtime.vision.site import tower_hooks
from lit_reduce.tokens import Budget, Reduction

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "mistral3"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Some(Reducer):
    """Keeps other groups of every image, at two blocks; remembers which, and what it saw."""

    name, kind, site = "some", "select", "encoder"

    def __init__(self, point="before", signals=()):
        super().__init__()
        self.point, self.signals, self.kept, self.seen = point, frozenset(signals), [], []

    def stages(self, depth, tokens, keep):
        return {0: (tokens + keep) // 2, depth - 1: keep} if not self.signals else {1: (tokens + keep) // 2}

    def reduce(self, tokens, keep):
        assert len(tokens.features) == 1
        self.seen.append(tokens)
        self.kept.append(tokens.features.sum(-1).topk(keep, dim=1).indices.sort(1).values)
        return Reduction(self.kept[-1])


def plain_pass(tiny):
    """What each block of the plain tower is called with, and what the tower and its mergers give."""
    tower, calls = tower_of(tiny.model), []

    def record(_, args, kwargs):
        calls.append((args, kwargs))

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in tower.blocks]
    encoded = encode(tiny.model, tiny.inputs)
    for hook in hooks:
        hook.remove()
    return tower, calls, encoded


def allowed(args, kwargs, count):
    """``[P, P]``, who sees whom in a block of the plain tower."""
    if "cu_seqlens" in kwargs:
        segment = torch.zeros(count).index_fill(0, kwargs["cu_seqlens"][1:-1].long(), 1).cumsum(0)
        return segment[:, None] == segment
    return args[1][0, 0] == 0


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention(block, x, seen, cos, sin):
    """By the plain formula; returns output, probabilities ``[H, P, P]`` and rotated keys ``[P, C]``."""
    if hasattr(block, "attn"):
        part, norm = block.attn, block.norm1
        q, k, v = part.qkv(norm(x)).unflatten(-1, (3, part.num_heads, -1)).permute(1, 2, 0, 3)
        project = part.proj
    else:
        part, norm = block.attention, block.attention_norm
        q, k, v = (
            p(norm(x)).unflatten(-1, (part.num_heads, -1)).transpose(0, 1)
            for p in (part.q_proj, part.k_proj, part.v_proj)
        )
        project = part.o_proj
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    logits = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    shown = logits.softmax(-1)
    return project((shown @ v).transpose(0, 1).flatten(1)), shown, k.transpose(0, 1).flatten(1)


def mlp(block, x):
    return block.mlp(block.norm2(x)) if hasattr(block, "attn") else block.feed_forward(block.ffn_norm(x))


def slow(tower, calls, gone, point):
    """All patches through the tower, ``gone[block]`` ``[P]`` hidden from there on, each keeping the state it left with.

    Returns the rows behind every block, and the attention of each.
    """
    x, rows, looks = calls[0][0][0].flatten(0, -2), [], []
    hidden = torch.zeros(len(x), dtype=torch.bool)
    for number, (block, (args, kwargs)) in enumerate(zip(tower.blocks, calls, strict=True)):
        if point == "before":
            hidden = hidden | gone.get(number, False)
        seen = allowed(args, kwargs, len(x)) & ~hidden | torch.eye(len(x), dtype=torch.bool)
        cos, sin = (t.reshape(len(x), -1) for t in kwargs["position_embeddings"])
        out, shown, keys = attention(block, x, seen, cos, sin)
        x = torch.where(hidden[:, None], x, x + out)
        if point == "attention":
            hidden = hidden | gone.get(number, False)
        x = torch.where(hidden[:, None], x, x + mlp(block, x))
        rows.append(x)
        looks.append((shown, keys))
    return rows, looks


def members(tiny):
    """Rows of the tower that make each visual token, by loops from the sizes in the inputs."""
    if "image_sizes" in tiny.inputs:
        found, start = [], 0
        for high, wide in (tiny.inputs["image_sizes"] // 4).tolist():
            found.append(
                [
                    [start + (2 * r + a) * wide + 2 * c + b for a in (0, 1) for b in (0, 1)]
                    for r in range(high // 2) for c in range(wide // 2)
                ]
            )  # fmt: skip
            start += high * wide
        return found
    thw = tiny.inputs.get("image_grid_thw", tiny.inputs.get("video_grid_thw")).tolist()
    windows = 2 if tiny.model.config.model_type == "qwen2_5_vl" else 99  # groups a window's side
    found, start = [], 0
    for frames, high, wide in thw:
        high, wide = high // 2, wide // 2
        order = [
            (t, r, c)
            for t in range(frames)
            for top in range(0, high, windows) for left in range(0, wide, windows)
            for r in range(top, min(top + windows, high)) for c in range(left, min(left + windows, wide))
        ]  # fmt: skip
        raster = {place: i for i, place in enumerate(order)}
        found.append(
            [
                [start + 4 * raster[t, r, c] + j for j in range(4)]
                for t in range(frames) for r in range(high) for c in range(wide)
            ]
        )  # fmt: skip
        start += 4 * len(order)
    return found


def patches_gone(tiny, reducer, blocks, groups=None):
    """``[P]`` at each block, which patches the reducer took there, from what it kept image by image."""
    groups = members(tiny) if groups is None else groups
    count = sum(len(group) for image in groups for group in image)
    left = [list(range(len(image))) for image in groups]
    gone = {}
    kept = iter(reducer.kept)
    for block in blocks:
        hidden = torch.zeros(count, dtype=torch.bool)
        for image, own in enumerate(groups):
            stay = next(kept)[0].tolist()
            left[image] = [left[image][i] for i in stay]
            for group in set(range(len(own))) - set(left[image]):
                hidden[own[group]] = True
        gone[block] = hidden
    return gone


@pytest.mark.parametrize("point", ["before", "attention"])
@pytest.mark.parametrize("family", PACKED)
def test_dropping_groups_equals_hiding_them(family, point):
    tiny = build(family)
    tower, calls, whole = plain_pass(tiny)
    reducer = Some(point)
    handle = tower_hooks(tiny.model, family_of(tiny.model.config), reducer, Budget(0.4)).install()
    after = []
    hook = tower.blocks[tower.feature].register_forward_hook(lambda _, __, out: after.append(out))
    encoded = encode(tiny.model, tiny.inputs)
    hook.remove()
    handle.remove()
    gone = patches_gone(tiny, reducer, [0, tower.depth - 1])
    assert all(bool(hidden.any()) for hidden in gone.values())
    rows, _ = slow(tower, calls, gone, point)
    assert float((after[0].flatten(0, -2) - rows[-1]).abs().max()) < TOLERANCE
    assert encoded.counts == whole.counts
    # What the language model gets is what the merger makes of the slow rows.
    visual = tiny.model.get_encoder("image")
    for level, block in enumerate(getattr(visual, "deepstack_visual_indexes", [])):
        expected = visual.deepstack_merger_list[level](rows[block])
        assert float((torch.cat(encoded.deepstack[level]) - expected).abs().max()) < TOLERANCE
    if family in ("qwen2_vl", "qwen3_vl"):
        assert float((torch.cat(encoded.features) - visual.merger(rows[-1])).abs().max()) < TOLERANCE
    assert float((torch.cat(encoded.features) - torch.cat(whole.features)).abs().max()) > 0.01


@pytest.mark.parametrize("point", ["before", "attention"])
@pytest.mark.parametrize("family", PACKED)
def test_what_the_reducer_sees(family, point):
    """Means over groups in raster order, of states and of the attention just before."""
    tiny = build(family)
    tower, calls, _ = plain_pass(tiny)
    reducer = Some(point, ["received", "keys", "cls_query", "size"])
    with attach(tiny.model, reducer, keep=0.4):
        encode(tiny.model, tiny.inputs)
    rows, looks = slow(tower, calls, {}, point)
    read = 0 if point == "before" else 1
    shown, keys = looks[read]
    args, kwargs = calls[read]
    seen = allowed(args, kwargs, shown.shape[-1])
    received = shown.mean(0).sum(0) / seen.sum(0)
    for tokens, own in zip(reducer.seen, members(tiny), strict=True):
        own = torch.tensor(own)
        assert float((tokens.signal("received")[0] - received[own].mean(1)).abs().max()) < TOLERANCE
        assert float((tokens.signal("keys")[0] - keys[own].mean(1)).abs().max()) < TOLERANCE
        assert tokens.signal("cls_query").shape == (1, keys.shape[1])
        if point == "before":
            assert float((tokens.features[0] - rows[0][own].mean(1)).abs().max()) < TOLERANCE
        assert tokens.grid[0] * tokens.grid[1] * tokens.grid[2] == len(own)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3"])
def test_evit_runs_and_nothing_stays_behind(family):
    tiny = build(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    before = {id(module): dict(vars(module)) for module in tiny.model.modules()}
    with attach(tiny.model, "evit", keep=0.4) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
        assert attached.stats.reducer_ms > 0
        assert attached.stats.kept == attached.stats.total
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, plain.logits, strict=True)) > 0.01
    assert installed(tiny.model) is None
    assert all("forward" not in vars(m) for m in tiny.model.modules() if "forward" not in before[id(m)])
    again = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


@pytest.mark.parametrize("family", PACKED)
def test_keeping_all_changes_no_bit(family):
    tiny = build(family)
    plain = encode(tiny.model, tiny.inputs).features
    with attach(tiny.model, "evit", keep=1.0):
        assert all(torch.equal(a, b) for a, b in zip(encode(tiny.model, tiny.inputs).features, plain, strict=True))


def test_llava_with_a_pixtral_tower():
    """One patch a token; features of patches that stay differ from the plain ones only through what is hidden."""
    torch.manual_seed(0)
    vision = {
        "model_type": "pixtral", "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 12,
        "num_hidden_layers": 3, "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    sizes = torch.tensor([[24, 32], [16, 24]])
    ids = torch.tensor([[5, *[IMAGE] * 48, 6, *[IMAGE] * 24, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": sizes}
    tiny = Tiny(model, inputs)
    tower, calls, _ = plain_pass(tiny)
    reducer = Some()
    after = []
    with attach(model, reducer, keep=0.4):
        hook = tower.blocks[-1].register_forward_hook(lambda _, __, out: after.append(out))
        encoded = encode(model, inputs)
        hook.remove()
    groups = [[[i] for i in range(48)], [[48 + i] for i in range(24)]]
    rows, _ = slow(tower, calls, patches_gone(tiny, reducer, [0, 2], groups), "before")
    assert float((after[0][0] - rows[-1]).abs().max()) < TOLERANCE
    assert encoded.counts == [48, 24]


def test_what_cannot_be_right_is_refused():
    tiny = build("qwen2_5_vl")
    with pytest.raises(UserError, match="every patch in its own place"):
        attach(tiny.model, "tome", keep=0.4)
    with pytest.raises(UserError, match="can only stay or go"), attach(tiny.model, create("evit", fuse=True), keep=0.4):
        encode(tiny.model, tiny.inputs)
    with (
        pytest.raises(UserError, match=r"block 2 of the vision tower.*ask for cls@0 or"),
        attach(tiny.model, Some("attention"), keep=0.4),
    ):
        encode(tiny.model, tiny.inputs, {"cls@2"})
    assert installed(tiny.model) is None
    assert "forward" not in vars(tiny.model.get_encoder("image"))


@pytest.mark.parametrize(("ends", "longest"), [("cu_seqlens", "max_seqlen"), ("cu_seq_lens_q", "max_length_q")])
def test_borders_and_longest_segment_follow_what_is_left(ends, longest):
    """What kernels for packed rows read: six groups of two patches in windows of 4, 2 and 6; one window gets empty."""
    x = torch.arange(12.0)[:, None]
    row = Row([Picture((1, 2, 3), 6)], [{0: 3}], torch.arange(12).view(6, 2), x)
    left = row.keep({0: torch.tensor([0, 3, 5])}, x)
    assert left[:, 0].tolist() == [0, 1, 6, 7, 10, 11]
    given = {"position_embeddings": (x, -x), ends: torch.tensor([0, 4, 6, 12], dtype=torch.int32), longest: 6}
    _, fitted = row.fit((), given)
    assert fitted[ends].tolist() == [0, 2, 6]
    assert fitted[ends].dtype == torch.int32
    assert fitted[longest] == 4
    assert fitted["position_embeddings"][1][:, 0].tolist() == [0, -1, -6, -7, -10, -11]
    _, fitted = row.fit((), given | {longest: torch.tensor(6)})
    assert torch.equal(fitted[longest], torch.tensor(4, dtype=torch.int32))
    assert row.groups(0, left)[0, :, 0].tolist() == [0.5, 6.5, 10.5]
    assert torch.equal(row.full(left + 100)[:, 0], x[:, 0] + 100 * torch.isin(x[:, 0], left[:, 0]))


def borders_stay(monkeypatch):
    right = Row.fit
    monkeypatch.setattr(
        Row, "fit", lambda self, args, kwargs: (right(self, args, kwargs)[0], right(self, args, kwargs)[1] | {
            "cu_seqlens": torch.tensor([0, len(self.places)], dtype=torch.int32)}),
    )  # fmt: skip


def rotations_of_others(monkeypatch):
    right = Row.fit

    def wrong(self, args, kwargs):
        args, fitted = right(self, args, kwargs)
        return args, fitted | {
            "position_embeddings": tuple(t[: len(self.places)] for t in kwargs["position_embeddings"])
        }

    monkeypatch.setattr(Row, "fit", wrong)


def forgets_what_left(monkeypatch):
    monkeypatch.setattr(Row, "full", lambda self, x: torch.zeros_like(self._bank).index_copy(0, self.places, x))


@pytest.mark.parametrize("mutate", [borders_stay, rotations_of_others, forgets_what_left], ids=lambda f: f.__name__)
def test_the_comparison_notices(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_dropping_groups_equals_hiding_them("qwen2_5_vl", "before")
