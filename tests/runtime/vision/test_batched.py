"""A reduced vision tower equals a slow one, block by block and image by image, that hides or merges the same."""

import pytest
import torch
from families import build
from torch.nn.functional import normalize

from lit_reduce.backbones.families import family_of
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach, encode
from lit_reduce.runtime.vision.base import installed
from lit_reduce.runtime.vision.batched import BatchedTowerHooks, State
from lit_reduce.runtime.vision.site import tower_hooks
from lit_reduce.tokens import Budget, Reduction

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
# Families with a CLIP-like tower, as the slow one below is: with CLS, without, in tiles, behind a shuffle, pooled.
TOWERS = ["llava", "paligemma", "llava_next", "smolvlm", "gemma3"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Some(Reducer):
    """Keeps other patches of every image, at two blocks."""

    name, site = "some", "encoder"

    def __init__(self, point: str, first: int = 0):
        super().__init__()
        self.point, self.first, self.kept = point, first, []

    def stages(self, depth, tokens, keep):
        return {self.first: (tokens + keep) // 2, self.first + 2: keep}

    def reduce(self, tokens, keep):
        self.kept.append(tokens.features.sum(-1).topk(keep, dim=1).indices.sort(1).values)
        return Reduction(self.kept[-1])


def attend(block, x, hidden, size):
    """Attention of one image ``[S, C]`` by the plain formula; returns its output, probabilities and keys by heads."""
    part = block.self_attn
    q, k, v = (
        p(block.layer_norm1(x)).unflatten(-1, (part.num_heads, -1)).transpose(0, 1)
        for p in (part.q_proj, part.k_proj, part.v_proj)
    )
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + size.log()
    shown = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return part.out_proj((shown @ v).transpose(0, 1).flatten(1)), shown, k


def slow(tower, x, act, point):
    """One image through the blocks; ``act(block index, x, hidden, size, probabilities, keys)`` may hide or merge."""
    hidden, size = torch.zeros(len(x), dtype=torch.bool), torch.ones(len(x))
    for number, block in enumerate(tower.blocks[: tower.depth]):
        if point == "before":
            x, hidden, size = act(number, x, hidden, size, None, None)
        out, shown, keys = attend(block, x, hidden, size)
        x = x + out
        if point == "attention":
            x, hidden, size = act(number, x, hidden, size, shown, keys)
        x = x + block.mlp(block.layer_norm2(x))
    return x, hidden


def enter(model, inputs):
    """What the first block gets, and what the block that feeds the projector gives."""
    tower, seen = tower_of(model), {}
    hooks = [
        tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        tower.blocks[tower.feature].register_forward_hook(lambda _, __, out: seen.update(out=out)),
    ]
    encoded = encode(model, inputs)
    for hook in hooks:
        hook.remove()
    return tower, seen["x"], seen["out"], encoded


@pytest.mark.parametrize("point", ["before", "attention"])
@pytest.mark.parametrize("family", TOWERS)
def test_dropping_patches_equals_hiding_them(family, point):
    tiny = build(family)
    reducer = Some(point, first=1 if family == "paligemma" else 0)
    handle = tower_hooks(tiny.model, family_of(tiny.model.config), reducer, Budget(0.4)).install()
    tower, first, out, encoded = enter(tiny.model, tiny.inputs)
    handle.remove()
    for image, x in enumerate(first):
        places = torch.arange(len(x) - tower.prefix)
        for chosen in reducer.kept:
            places = places[chosen[image]]
        before = {reducer.first: reducer.kept[0][image], reducer.first + 2: places}

        def hide(number, x, hidden, size, *_, before=before):
            if number in before:
                hidden = torch.ones_like(hidden).index_fill(0, before[number] + tower.prefix, False)
                hidden[: tower.prefix] = False
            return x, hidden, size

        expected, hidden = slow(tower, x, hide, point)
        mine = out[image] if len(out[image]) < len(x) else out[image][~hidden]
        assert float((mine - expected[~hidden]).abs().max()) < TOLERANCE
        if family in ("llava", "paligemma"):
            assert torch.equal(encoded.kept_indices[image], places)
            assert len(encoded.features[image]) == len(places) < encoded.counts[image] == 36


def test_a_dropped_patch_comes_back_as_it_left():
    tiny = build("gemma3")
    handle = tower_hooks(tiny.model, family_of(tiny.model.config), Some("before"), Budget(0.4)).install()
    first = tower_of(tiny.model).blocks[0]
    seen = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, _, out, encoded = enter(tiny.model, tiny.inputs)
    hook.remove()
    handle.remove()
    gone = torch.ones(out.shape[:2], dtype=torch.bool).scatter(1, handle.reducer.kept[0], False)
    assert torch.equal(out[gone], seen[0][gone])
    assert encoded.kept_indices == []
    assert [len(x) for x in encoded.features] == [9, 9, 9]


def merge(keep):
    """ToMe by loops."""

    def act(number, x, hidden, size, _, keys):
        tokens = x[1:]
        metric = normalize(keys.transpose(0, 1).flatten(1)[1:], dim=-1)
        pairs = []
        for a in range(0, len(tokens), 2):
            b = max(range(1, len(tokens), 2), key=lambda j: float(metric[a] @ metric[j]))
            pairs.append((float(metric[a] @ metric[b]), a, b))
        pairs = sorted(pairs, key=lambda p: -p[0])[: len(tokens) - keep[number]]
        groups = {i: [i] for i in range(len(tokens)) if i not in {a for _, a, _ in pairs}}
        for _, a, b in pairs:
            groups[b].append(a)
        weight = size[1:]
        new = [sum(tokens[i] * weight[i] for i in g) / sum(weight[i] for i in g) for g in groups.values()]
        sizes = torch.stack([sum(weight[i] for i in g) for g in groups.values()])
        x, size = torch.cat([x[:1], torch.stack(new)]), torch.cat([size[:1], sizes])
        return x, torch.zeros(len(x), dtype=torch.bool), size

    return act


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_tome_equals_merging_by_loops(kernel):
    tiny = build("llava", kernel)
    with attach(tiny.model, create("tome"), keep=11):
        tower, first, out, encoded = enter(tiny.model, tiny.inputs)
        sizes = encode(tiny.model, tiny.inputs, {"size"}).signals["size"]
    keep = create("tome").stages(tower.depth, 36, 11)
    assert keep == {0: 27, 1: 19, 2: 11}
    for image, x in enumerate(first):
        expected, _ = slow(tower, x, merge(keep), "attention")
        assert float((out[image] - expected).abs().max()) < TOLERANCE
        assert len(encoded.kept_indices[image]) == 11
        assert float(sizes[image].sum()) == 36


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_evit_equals_choosing_by_loops(family, fuse):
    tiny = build(family)
    reducer = create("evit", fuse=fuse)
    with attach(tiny.model, reducer, keep=8):
        tower, first, out, _ = enter(tiny.model, tiny.inputs)
    prefix, keep = tower.prefix, reducer.stages(tower.depth, 36, 8)

    def choose(number, x, hidden, size, shown, _):
        if number not in keep:
            return x, hidden, size
        attention = shown.mean(0)[0, 1:] if prefix else shown.mean(0).mean(0)
        ranked = sorted(range(len(attention)), key=lambda i: -float(attention[i]))
        best, tokens = set(ranked[: keep[number]]), x[prefix:].clone()
        if fuse:
            rest = ranked[keep[number] - 1 :]
            tokens[rest[0]] = sum(x[prefix:][i] * attention[i] for i in rest)
        x = torch.cat([x[:prefix], tokens[sorted(best)]])
        return x, torch.zeros(len(x), dtype=torch.bool), torch.ones(len(x))

    for image, x in enumerate(first):
        expected, _ = slow(tower, x, choose, "attention")
        assert float((out[image] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", ["tome", "evit"])
@pytest.mark.parametrize("family", ["llava", "smolvlm", "internvl"])
def test_a_batch_equals_its_images_and_nothing_stays_behind(family, name):
    tiny = build(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    state = {id(module): dict(vars(module)) for module in tiny.model.modules()}
    with attach(tiny.model, create(name), keep=0.4) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
        assert installed(tiny.model) is not None
        short = attached.stats.kept < attached.stats.total
        assert attached.stats.reducer_ms > 0
        single = [tiny.inputs["pixel_values"][:1], tiny.inputs["pixel_values"][1:]]
        whole = encode(tiny.model, tiny.inputs).features
        parts = [x for pixels in single for x in features(tiny, pixels)]
    assert short == (family == "llava")
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, plain.logits, strict=True)) > 0.1
    assert float((torch.cat(whole) - torch.cat(parts)).abs().max()) < TOLERANCE
    again = tiny.model.generate(**tiny.inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))
    assert installed(tiny.model) is None
    assert all("forward" not in vars(module) for module in tiny.model.modules() if "forward" not in state[id(module)])


def features(tiny, pixels):
    out = tiny.model.base_model.get_image_features(pixels, return_dict=True).pooler_output
    return [x.reshape(-1, x.shape[-1]) for x in out]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_keeping_all_changes_no_bit(family):
    tiny = build(family)
    plain = features(tiny, tiny.inputs["pixel_values"])
    handle = tower_hooks(tiny.model, family_of(tiny.model.config), create("evit"), Budget(1.0)).install()
    assert all(torch.equal(a, b) for a, b in zip(features(tiny, tiny.inputs["pixel_values"]), plain, strict=True))
    handle.remove()


def test_tower_and_projector_together():
    tiny = build("llava")
    with attach(tiny.model, ["tome", create("random")], keep=[20, 6]) as attached:
        tiny.model.generate(**tiny.inputs, **GREEDY)
        left = encode(tiny.model, tiny.inputs).kept_indices
    assert (attached.stats.kept, attached.stats.total) == (18, 108)
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(attached.prompt_map.kept_indices, left, strict=True))


def sizes_do_not_count(monkeypatch):
    right = BatchedTowerHooks._mask
    monkeypatch.setattr(BatchedTowerHooks, "_mask", lambda self, *args: torch.zeros_like(right(self, *args)))


def another_patch_stays(monkeypatch):
    right = State.after
    monkeypatch.setattr(
        State,
        "after",
        lambda self, out, x: right(self, Reduction((out.kept_indices + 1) % self.kept_indices.shape[1]), x),
    )


def the_mlp_runs_twice(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("lit_reduce.runtime.vision.base._without", lambda *_, **__: nullcontext())


@pytest.mark.parametrize(
    "mutate", [sizes_do_not_count, another_patch_stays, the_mlp_runs_twice], ids=lambda f: f.__name__
)
def test_the_comparisons_notice(mutate, monkeypatch):
    mutate(monkeypatch)
    check = test_dropping_patches_equals_hiding_them if mutate is another_patch_stays else None
    with pytest.raises(AssertionError):
        check("llava", "before") if check else test_tome_equals_merging_by_loops("sdpa")


def test_what_a_tower_cannot_do_is_refused():
    tiny = build("llava")
    with pytest.raises(UserError, match="cannot be reached in 3 blocks"), attach(tiny.model, "tome", keep=2):
        tiny.model.generate(**tiny.inputs, **GREEDY)
    reducer = Some("behind")
    with pytest.raises(UserError, match="point 'behind'"):
        attach(tiny.model, reducer)
    reducer.point, reducer.signals = "before", frozenset({"text"})
    with pytest.raises(UserError, match="'text' inside the vision tower"):
        attach(tiny.model, reducer)
    reducer.signals = frozenset({"cls"})
    with pytest.raises(UserError, match="before the first block"), attach(tiny.model, reducer, keep=9):
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert installed(tiny.model) is None
    assert "generate" not in vars(tiny.model)
