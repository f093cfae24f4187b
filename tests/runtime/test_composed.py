"""Reducers at several sites at once: each sees the tokens that the one before it left, and signals that fit them."""

from functools import partial

import pytest
import torch
from families import Tiny, build
from hidden import Hidden

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach, encode
from lit_reduce.tokens import Reduction

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Every(Reducer):
    """Keeps some tokens and remembers what it saw."""

    name, kind = "every", "select"

    def __init__(self, site, signals, stage=2, point="before"):
        super().__init__()
        self.site, self.signals, self.point, self.stage = site, frozenset(signals), point, stage
        self.seen, self.kept = [], []

    def stages(self, depth, tokens, keep):
        return {} if self.site == "projector" else {self.stage: keep}

    def reduce(self, tokens, keep):
        self.seen.append(tokens)
        score = tokens.signal("last") if "last" in self.signals else tokens.features.sum(-1)
        self.kept.append(score.topk(keep, dim=1).indices.sort(1).values)
        return Reduction(self.kept[-1])


@pytest.mark.parametrize("name", ["evit", "tome"])
@pytest.mark.parametrize("behind", ["decoder", "projector"])
def test_signals_of_a_reduced_tower_belong_to_the_tokens_that_are_left(behind, name):
    """Block outputs and keys of blocks with 36, with some, and with the final tokens: rows of the same patches."""
    tiny = build("llava")
    asked = ["encoder", "encoder@0", "encoder@1", "encoder@2", "keys@0", "keys@1", "keys@2"]
    reader, tower = Every(behind, asked), create(name)
    blocks, reads = {}, {}
    hooks = []
    for i, layer in enumerate(tiny.model.get_encoder("image").encoder.layers):
        see = partial(lambda i, _, __, out: blocks.update({i: out[:, 1:]}), i)
        read = partial(lambda i, _, __, out: reads.setdefault(i, []).append(out[:, 1:]), i)
        hooks += [layer.register_forward_hook(see), layer.self_attn.k_proj.register_forward_hook(read)]
    with attach(tiny.model, [tower, reader], keep=[11, 5]) as attached:
        tiny.model(**tiny.inputs)
        kept_indices = torch.stack(encode(tiny.model, tiny.inputs).kept_indices)
    for hook in hooks:
        hook.remove()
    # Which patch each row of a block is: merged and dropped ones never come back, so kept sets are nested.
    rows = {}
    for text in asked[1:]:
        kind, _, block = text.partition("@")
        seen = blocks[int(block)] if kind == "encoder" else reads[int(block)][0]
        rows[text] = seen
    got = {text: torch.cat([t.signal(text) for t in reader.seen]) for text in asked}
    for text, seen in rows.items():
        for image, mine in enumerate(got[text]):
            if seen.shape[1] == 36:
                assert torch.allclose(mine, seen[image, kept_indices[image]], atol=1e-6)
            elif seen.shape[1] == 11:
                assert torch.allclose(mine, seen[image], atol=1e-6)
            else:  # in between: every row must be one of that block's, in their order
                near = torch.cdist(mine, seen[image], compute_mode="donot_use_mm_for_euclid_dist").min(1)
                assert float(near.values.max()) < 1e-5
                assert bool((near.indices.diff() > 0).all())
    assert {seen.shape[1] for seen in rows.values()} > {36, 11}
    assert attached.stats.total == 108


def test_signals_in_between_are_those_of_the_right_patches():
    """Known places: patches that stay at each block are chosen beforehand."""
    tiny = build("llava")

    class Given(Every):
        def stages(self, depth, tokens, keep):
            return {0: 20, 2: 6}

        def reduce(self, tokens, keep):
            step = torch.arange(keep) * (3 if tokens.count == 20 else 1) + (1 if tokens.count == 20 else 3)
            return Reduction(step.expand(len(tokens.features), -1))

    reader = Every("projector", ["keys@1"])
    first = {}
    hook = (
        tiny.model.get_encoder("image")
        .encoder.layers[1]
        .self_attn.k_proj.register_forward_hook(lambda _, __, out: first.update(keys=out[:, 1:]))
    )
    with attach(tiny.model, [Given("encoder", []), reader], keep=[6, 3]) as attached:
        tiny.model(**tiny.inputs)
    hook.remove()
    places = torch.arange(6) * 3 + 1  # among the 20 that block 1 saw, which were patches 3 to 22
    assert torch.allclose(reader.seen[0].signal("keys@1"), first["keys"][:, places], atol=1e-6)
    assert attached.prompt_map.kept_indices[0].tolist() == [int(places[i]) + 3 for i in reader.kept[0][0]]


def test_a_tower_that_gives_all_back_refuses_signals_it_no_longer_has():
    tiny = build("smolvlm")
    with (
        pytest.raises(UserError, match=r"'cls@2' is read in block 2.*evit"),
        attach(tiny.model, ["evit", Every("projector", ["cls@2"])], keep=0.5),
    ):
        tiny.model(**tiny.inputs)
    with attach(tiny.model, ["evit", Every("projector", ["cls@0", "encoder"])], keep=0.5) as attached:
        tiny.model(**tiny.inputs)
    assert attached.stats.kept < attached.stats.total


def test_a_signal_of_the_whole_image_stays_with_who_asked_for_it():
    tiny = build("llava")
    found = []
    for asked in ([], ["cls_query"]):
        second = Every("decoder", ["keys", "last"])
        with attach(tiny.model, [Every("projector", asked), second], keep=[35, 4]):
            found.append(tiny.model(**tiny.inputs).logits)
        assert {"keys", "cls_query"} & set(second.seen[0].signals) == {"keys"}
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_projector_decoder_and_cache_together(family):
    """Equals the hiding model that reads the prompt as the projector's reducer left it."""
    tiny = build(family)
    names = [create("grid"), Every("decoder", ["last"]), Every("cache", ["last"], stage=0)]
    names[2].stages = lambda depth, tokens, keep: dict.fromkeys(range(depth), min(tokens, keep))
    with attach(tiny.model, names, keep=[6, 4, 2]) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
        stats = attached.stats
        short, _ = attached.shorten(tiny.inputs)
    reference = Tiny(tiny.model, short, tiny.token)
    with Hidden(reference, names[1], Both(names[2]), keep=4):
        expected = tiny.model.generate(**short, **GREEDY)
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, expected.logits, strict=True)) < TOLERANCE
    assert stats.kept == 2 * 3
    assert stats.layers == (18, 18, 12, 12, 12)


class Both(Reducer):
    """Another budget for the second of two reducers in one reference."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.name, self.kind, self.site, self.signals = inner, "both", "select", "cache", inner.signals

    def stages(self, depth, tokens, keep):
        return dict.fromkeys(range(depth), 2)

    def reduce(self, tokens, keep):
        return self.inner.reduce(tokens, 2)


def test_a_signal_of_the_whole_image_is_refused_inside_the_language_model():
    with pytest.raises(UserError, match="'cls_query' is one for the whole image"):
        attach(build("llava").model, Every("decoder", ["cls_query"]), keep=5)
