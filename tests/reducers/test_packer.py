"""The packer against slow loops in double precision: which region a point reads, how, and what may speak in it."""

import math

import pytest
import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.ops.cells import cells
from lit_reduce.plugin import BackboneId, PluginConfig, create_for, load_plugin, save_plugin
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime.encode import encode
from lit_reduce.tokens import VisualTokens
from lit_reduce_pocket.model import build_model

WIDTH, TOWER = 6, 8  # of the made-up tokens
OPTIONS = {"hidden_size": WIDTH, "vision_hidden_size": TOWER, "width": 12, "heads": 3}
KINDS = [{}, {"levels": [0.5, -1]}, {"text": True}, {"levels": [-2], "text": True}]
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def packer(seed: int = 0, **options) -> Reducer:
    """Weights large enough that everything that is read shows in the new tokens."""
    reducer = create("packer", **{**OPTIONS, **options}).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.5, generator=generator)
    return reducer


def loud(tokens: VisualTokens) -> VisualTokens:
    """The same with padding of prompts that would be heard."""
    if "text" not in tokens.signals:
        return tokens
    text = tokens.signals["text"].masked_fill(~tokens.signals["text_mask"][..., None], 50.0)
    return VisualTokens(tokens.features, tokens.grid, {**tokens.signals, "text": text})


def slowly(reducer: Reducer, tokens: VisualTokens, image: int, keep: int) -> Tensor:
    """New tokens ``[K, D]`` of one picture, written from the description: float64, one point and one head at a time."""
    weights = {name: w.double() for name, w in reducer.state_dict().items()}
    heads, width = reducer.config.heads, reducer.config.width

    def even(x: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt()

    def linear(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))

    def normal(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def branch(name: str, x: Tensor) -> Tensor:
        return normal(f"{name}.3", linear(f"{name}.2", gelu(linear(f"{name}.0", x))))

    _, assignment = cells(tokens.grid, tokens.count, keep)
    features = tokens.features[image].double()
    levels = [tokens.signals[f"encoder@{layer}"][image].double() for layer in reducer.config.levels]
    made = []
    for point in range(keep):
        inside = [n for n in range(tokens.count) if assignment[n] == point]
        pooled = sum(features[n] for n in inside) / len(inside)
        query = linear("point", even(pooled))
        if reducer.config.text:
            mask = tokens.signals["text_mask"][image]
            words = [even(w.double()) for w, real in zip(tokens.signals["text"][image], mask, strict=True) if real]
            query = query + normal("ask.1", linear("ask.0", sum(words) / len(words)))
        query = normal("normal", query)
        seen = [torch.cat([even(features[n]), *(even(level[n]) for level in levels)]) for n in inside]
        keys, values = [branch("key", x) for x in seen], [branch("value", x) for x in seen]
        read = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = [float(query[part] @ key[part]) / math.sqrt(width // heads) for key in keys]
            total = sum(math.exp(s) for s in scores)
            read.append(sum(math.exp(s) / total * v[part] for s, v in zip(scores, values, strict=True)))
        out = linear("leave.2", gelu(linear("leave.0", torch.cat(read))))
        made.append(pooled + pooled.square().mean().sqrt() * out)
    return torch.stack(made)


@kinds
@pytest.mark.parametrize(
    ("grid", "extra", "keep"), [((1, 4, 6), 0, 7), ((2, 3, 4), 0, 5), ((1, 5, 3), 4, 6), ((1, 3, 3), 0, 1)]
)
def test_it_equals_a_slow_loop(options, grid, extra, keep, made) -> None:
    """Regions of unequal size, frames, newline tokens, one region that is all; double precision in, same out."""
    reducer = packer(**options)
    tokens = loud(made(reducer, grid=grid, extra=extra))
    assert keep in (1, 6) or len(set(cells(grid, tokens.count, keep)[1].bincount().tolist())) > 1
    double = VisualTokens(
        tokens.features.double(),
        grid,
        {k: x.double() if x.is_floating_point() else x for k, x in tokens.signals.items()},
    )
    with torch.no_grad():
        single, exact = reducer(tokens, keep), reducer.double()(double, keep)
        for image in range(3):
            expected = slowly(reducer, double, image, keep)
            # The pooling beneath sums in float32, whatever comes in.
            torch.testing.assert_close(exact.features[image], expected, atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(single.features[image].double(), expected, atol=1e-4, rtol=1e-4)
            moved = (expected - create("pool")(double, keep).features[image]).abs().amax(-1)
            assert (moved > 1e-2).all(), "every point must read something, or the test proves nothing"


@kinds
@pytest.mark.parametrize("keep", [1, 7, 23])
def test_untrained_it_is_average_pooling_to_the_bit(options, keep, made) -> None:
    reducer = create("packer", **OPTIONS, **options)
    tokens = made(reducer)
    start, pool = reducer(tokens, keep), create("pool")(tokens, keep)
    assert torch.equal(start.features, pool.features)
    assert torch.equal(start.kept_indices, pool.kept_indices)
    assert torch.equal(start.assignment, pool.assignment)
    start.features.square().sum().backward()
    assert reducer.leave[-1].weight.grad.abs().sum() > 0, "a start that nothing can leave"


@kinds
def test_a_batch_equals_its_images_one_by_one(options, made) -> None:
    reducer = packer(**options)
    tokens = loud(made(reducer, batch=4))
    together = reducer(tokens, 7)
    for image in range(4):
        signals = {name: x[image : image + 1] for name, x in tokens.signals.items()}
        if "text" in signals:  # with no padding at all
            signals = {name: x[:, : image + 1] if "text" in name else x for name, x in signals.items()}
        alone = reducer(VisualTokens(tokens.features[image : image + 1], tokens.grid, signals), 7)
        torch.testing.assert_close(alone.features[0], together.features[image], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.kept_indices[0], together.kept_indices[image])


@pytest.mark.parametrize("keep", [1, 5, 16, 24])
def test_a_token_speaks_in_its_own_region_alone(keep, made) -> None:
    reducer = packer(levels=[-1])
    tokens = made(reducer, grid=(1, 5, 5))
    before = reducer(tokens, keep)
    for token in (0, 12, 24):
        for name in ("features", "encoder@-1"):
            parts = {"features": tokens.features, **tokens.signals}
            parts[name] = parts[name].clone()
            parts[name][:, token] *= -1
            after = reducer(VisualTokens(parts.pop("features"), tokens.grid, parts), keep)
            moved = (after.features - before.features).abs().amax(-1) > 1e-6
            assert torch.equal(moved, torch.arange(keep).expand(3, -1) == before.assignment[:, token, None])


def test_one_set_of_weights_serves_every_budget_of_pockets_grid(made) -> None:
    reducer = packer()
    tokens = made(reducer, batch=1, grid=(1, 24, 24))
    for keep in (16, 17, 64, 100, 191, 192):
        reduction = reducer(tokens, keep)
        assert reduction.features.shape == (1, keep, WIDTH)
        assert reduction.features.isfinite().all()
    assert reducer(tokens, 576).features is None


def test_half_precision_stays_near(made) -> None:
    reducer = packer()
    tokens = made(reducer)
    half = reducer.bfloat16()(VisualTokens(tokens.features.bfloat16(), tokens.grid, {}), 7).features
    assert half.dtype == torch.bfloat16
    assert (half.float() - packer()(tokens, 7).features).abs().max() < 0.3  # values of up to 10, eight bits


def test_the_prompt_is_heard_only_when_asked_for_and_its_padding_never(made) -> None:
    deaf, hears = packer(), packer(text=True)
    assert (deaf.signals, hears.signals) == (frozenset(), {"text"})
    tokens = made(hears)
    changed = tokens.signals["text"].clone()
    changed[:, 0] *= -1
    other = VisualTokens(tokens.features, tokens.grid, {**tokens.signals, "text": changed})
    assert ((hears(other, 6).features - hears(tokens, 6).features).abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(hears(loud(tokens), 6).features, hears(tokens, 6).features)
    silent = {name: x[:, :0] for name, x in tokens.signals.items()}
    assert hears(VisualTokens(tokens.features, tokens.grid, silent), 6).features.isfinite().all()


def test_answers_are_never_seen(tiny, pictures) -> None:
    reducer = packer(hidden_size=32, vision_hidden_size=24, text=True, levels=[1])
    prompt = tiny.prepare([pictures[0]], ["what is the red ?"])

    def made(inputs) -> Tensor:
        return reducer(encode(tiny.model, inputs, reducer.signals).tokens([0], reducer.signals), 9).features

    expected = made(prompt)
    for reply in ([20, 21], [40, 41]):
        answer = torch.tensor([reply])
        ids = torch.cat([prompt["input_ids"], answer], 1)
        labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], 1)
        inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(made({**inputs, "labels": labels}), expected)
        assert not torch.allclose(made(inputs), expected)


@kinds
def test_saved_and_loaded_it_gives_the_same_bits(options, made, tmp_path) -> None:
    backbone = BackboneId("tiny", "00", "llava", WIDTH, TOWER, 24)
    rest = {name: value for name, value in {**OPTIONS, **options}.items() if "hidden_size" not in name}
    fresh = create_for(backbone, "packer", rest)
    assert (fresh.config.hidden_size, fresh.config.vision_hidden_size) == (WIDTH, TOWER)
    reducer = packer(**options)
    save_plugin(tmp_path, reducer, PluginConfig("packer", {}, backbone, [7]))
    loaded, config = load_plugin(tmp_path, backbone=backbone)
    tokens = made(reducer)
    assert loaded.signals == reducer.signals
    assert config.options == {**OPTIONS, "levels": [], "text": False, **options}
    assert torch.equal(loaded(tokens, 7).features, reducer(tokens, 7).features)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 9, "heads": 2}, "heads"), ({"levels": ["x"]}, "levels"), ({"levels": 3}, "levels")],
)
def test_settings_that_cannot_work_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        create("packer", hidden_size=WIDTH, **options)


def test_a_tower_of_another_width_is_refused(made) -> None:
    """Backbones that join several layers before the projector say the width of all of them."""
    reducer = packer(levels=[1], vision_hidden_size=2 * TOWER)
    with pytest.raises(UserError, match=f"'encoder@1' has width {TOWER}.*vision_hidden_size={TOWER}$"):
        reducer(made(reducer), 5)


@pytest.mark.parametrize("options", [{}, {"text": True}, {"levels": [0.5]}], ids=str)
def test_it_is_at_most_a_twentieth_of_pocket(options) -> None:
    pocket = build_model()
    sizes = {"hidden_size": pocket.config.text_config.hidden_size, "vision_hidden_size": 192}
    ours = sum(p.numel() for p in create("packer", **sizes, **options).parameters())
    assert ours <= 0.05 * sum(p.numel() for p in pocket.parameters())
