"""Mixture of depths: the published schedule, exact averages, routers by hand, and training that moves them."""

import itertools
import math
from typing import Any

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import cosine_decay
from lit_reduce.plugin import create_for
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach
from lit_reduce.tokens import VisualTokens

WIDTH, DEPTH = 6, 4


def made_mod(seed: int = 0, **options: Any) -> Reducer:
    reducer = create("mod", **{"hidden_size": WIDTH, "depth": DEPTH, **options}).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.7, generator=generator)
    return reducer


def tokens_of(grid: tuple[int, int, int], layer: int, batch: int = 2) -> VisualTokens:
    generator = torch.Generator().manual_seed(3)
    count = grid[0] * grid[1] * grid[2]
    return VisualTokens(4 * torch.randn(batch, count, WIDTH, generator=generator), grid, {}, layer)


def test_the_papers_own_schedule_comes_out_at_its_own_mean() -> None:
    """32 layers, 576 tokens: all tokens before layer 8, then the cosine, at least 15 %; 53.75 % on average."""
    paper = [576] * 8 + [int(576 * max(0.15, math.cos(math.pi * n / 31) / 2 + 0.5)) for n in range(8, 32)]
    mean = sum(paper) / 32
    assert abs(mean / 576 - 0.5375) < 0.001
    for keep in (math.floor(mean), math.ceil(mean)):
        counts = cosine_decay(32, 576, keep)
        assert max(abs(a - b) for a, b in zip(counts, paper, strict=True)) <= 2
        assert counts[:8] == [576] * 8


@pytest.mark.parametrize("depth", [1, 5, 6, 24, 32])
@pytest.mark.parametrize("tokens", [36, 576, 2880])
def test_layers_see_the_budget_on_average_exactly(depth: int, tokens: int) -> None:
    for keep in {1, 2, 16, tokens // 9, tokens // 3, tokens // 2, tokens * 4 // 5, tokens - 1} & set(range(1, tokens)):
        counts = cosine_decay(depth, tokens, keep)
        assert sum(counts) == keep * depth
        assert all(tokens >= a >= b >= 1 for a, b in itertools.pairwise([tokens, *counts]))


def test_more_budget_never_takes_tokens_from_a_layer_by_much() -> None:
    for keep in range(16, 570, 7):
        less, more = cosine_decay(6, 576, keep), cosine_decay(6, 576, keep + 7)
        # At the step from 85 % to all tokens of one layer the others give way, together by no more than that step.
        assert sum(max(0, a - b) for a, b in zip(less, more, strict=True)) <= 0.15 * 576 + 6


def test_constant_and_alternate_schedules() -> None:
    assert create("mod", depth=4, schedule="constant").stages(4, 36, 9) == {0: 9, 1: 9, 2: 9, 3: 9}
    alternate = create("mod", depth=32, schedule="alternate")
    stages = alternate.stages(32, 100, 60)  # VideoLLM-MoD: a fifth of the tokens at every other layer
    assert stages == dict.fromkeys(range(1, 32, 2), 20)
    with pytest.raises(UserError, match="see all 100; give 51 or more"):
        alternate.stages(32, 100, 50)
    assert min(alternate.stages(32, 100, 51).values()) >= 1


def test_a_decoder_of_another_depth_is_refused(tiny: Backbone) -> None:
    with pytest.raises(UserError, match="routers for 4 layers, the decoder has 5"):
        attach(tiny.model, made_mod(hidden_size=32), keep=9)
    with pytest.raises(UserError, match="no router for layer -1"):
        made_mod()(tokens_of((1, 4, 6), -1), 5)
    assert create_for(tiny.identity, "mod", {}).config.depth == 5
    with pytest.raises(UserError, match="alpha"):
        create("mod", alpha=1.5)


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.2}, {"symmetric": False}, {"weight": "sigmoid", "symmetric": False}, {"per_frame": True}],
    ids=str,
)
def test_routers_by_hand(layer: int, options: dict[str, Any]) -> None:
    """One token at a time, in plain Python."""
    reducer, tokens, keep = made_mod(**options), tokens_of((3, 2, 4), layer), 8
    router, bias = reducer.routers[layer].tolist(), float(reducer.bias.detach()[layer])
    out = reducer(tokens, keep)
    for image in range(2):
        logits = []
        for x in tokens.features[image].tolist():
            size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
            logits.append(sum(v / size * r for v, r in zip(x, router, strict=True)) + bias)
        groups = [range(8 * f, 8 * f + 8) for f in range(3)] if options.get("per_frame") else [range(24)]
        shares = [2, 3, 3] if options.get("per_frame") else [8]
        best = [sorted(group, key=lambda n: -logits[n])[:share] for group, share in zip(groups, shares, strict=True)]
        stays = sorted(itertools.chain(*best))
        assert out.kept_indices[image].tolist() == stays
        for n, logit in enumerate(logits):
            if options.get("weight") == "sigmoid":
                expected = 2 / (1 + math.exp(-logit))
            else:
                expected = 1 + options.get("alpha", 0.05) * math.tanh(logit)
            if n not in stays and not options.get("symmetric", True):
                expected = 1.0
            assert float(out.weight.detach()[image, n]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_an_untrained_router_leaves_every_layer_as_it_is(tiny: Backbone, batch: dict[str, Any]) -> None:
    """Weights of exactly 1: the same to the bit as no weights at all."""
    with attach(tiny.model, create_for(tiny.identity, "mod", {}).eval(), keep=15) as attached:
        logits = tiny.model(**batch).logits
        attached.sites["decoder"][0].register_forward_hook(lambda _, __, out: _unweighted(out))
        assert torch.equal(tiny.model(**batch).logits, logits)
    assert sum(attached.stats.layers) == 3 * 15 * 5


def _unweighted(reduction: Any) -> Any:
    assert bool((reduction.weight == 1).all())
    return type(reduction)(reduction.kept_indices)


@torch.no_grad()
def test_layers_and_tokens_one_by_one(tiny: Backbone, batch: dict[str, Any]) -> None:
    """The whole language model by hand: float64, one sample, each layer on a gathered list of tokens."""
    model = tiny.model.double()
    ids = batch["input_ids"][1:][:, batch["attention_mask"][1].bool()]
    pixels = batch["pixel_values"][2:].double()
    reducer = made_mod(hidden_size=32, depth=5, alpha=0.4).double()
    with attach(model, reducer, keep=14):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    decoder = model.get_decoder()
    image = (ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    h = model.get_input_embeddings()(ids)[0].clone()
    h[image] = model.get_image_features(pixels).pooler_output[0]
    for number, (layer, count) in enumerate(zip(decoder.layers, cosine_decay(5, 36, 14), strict=True)):
        chosen = reducer(VisualTokens(h[image][None], (1, 6, 6), {}, number), count)
        inside = [image[n] for n in chosen.kept_indices[0].tolist()]
        there = [n for n in range(len(h)) if n not in image or n in inside]
        places = torch.tensor([there])
        angles = decoder.rotary_emb(h[None], places)
        mask = torch.full((len(there), len(there)), -1e300, dtype=torch.float64).triu(1)[None, None]
        out = layer(h[there][None], attention_mask=mask, position_embeddings=angles, position_ids=places)[0]
        new = h.clone()
        for place, n in enumerate(image):
            w = float(chosen.weight[0, place])
            new[n] = h[n] + w * (out[there.index(n)] - h[n]) if n in inside else w * h[n]
        for n in set(range(len(h))) - set(image):
            new[n] = out[there.index(n)]
        h = new
    expected = model.lm_head(decoder.norm(h))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # rotations are computed in float32
