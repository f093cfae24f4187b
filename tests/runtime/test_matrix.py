"""Every family with every reducer before the language model: dropping a token equals hiding it from the plain model.

A family is a row of ``FAMILIES``, a reducer a row of the register; both are run here as soon as they exist.
"""

import functools

import pytest
import torch
from families import FAMILIES, VIDEO_FAMILIES, Tiny, build
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lit_reduce.reducer import Reducer, available, create
from lit_reduce.runtime import attach, encode
from lit_reduce.tokens import Reduction, VisualTokens

TOLERANCE = 1e-4  # float32; weights of std 0.25 make logits of about 5
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
ALL = [*FAMILIES, *VIDEO_FAMILIES]
KEEP = 0.4


class Uneven(Reducer):
    """Keeps another number of tokens of every image and changes them."""

    name, kind = "uneven", "resample"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        score = tokens.features.sum(-1)
        counts = 1 + (score.abs().sum(1) * 100).long() % keep
        anchors = score.topk(keep, dim=1).indices.masked_fill(torch.arange(keep) >= counts[:, None], tokens.count)
        anchors = anchors.sort(1).values
        valid = anchors < tokens.count
        anchors = anchors.clamp(max=tokens.count - 1)
        x = tokens.features.gather(1, anchors[..., None].expand(-1, -1, tokens.features.shape[-1]))
        return Reduction(anchors, features=x * 1.5 - 0.1, valid=valid)


def reducers() -> dict[str, Reducer]:
    """What needs no training, at the projector."""
    named = {name: create(name) for name, cls in available().items() if not cls.trained}
    return {"uneven": Uneven()} | {name: reducer for name, reducer in named.items() if reducer.site == "projector"}


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> Tiny:
    """One model for the whole file; Gemma3 with a window that is longer than any prompt (see below for its own)."""
    tiny = build(family, attention)
    tiny.model.requires_grad_(False)
    if family == "gemma3":
        widen(tiny.model, 512)
    return tiny


def widen(model, window: int) -> None:
    model.config.text_config.sliding_window = window
    for layer in model.get_decoder().layers:
        layer.self_attn.sliding_window = window if layer.self_attn.sliding_window is not None else None


@torch.no_grad()
def hidden(tiny: Tiny, inputs: dict, reducer: Reducer, keep: float) -> dict:
    """The full prompt, in which the mask hides what the reducer drops of each picture; positions as ever."""
    model, ids, mask = tiny.model, inputs["input_ids"], inputs["attention_mask"]
    kind = "video" if tiny.token == 101 else "image"
    encoded = encode(model, inputs, reducer.signals)
    stays, new = [], []
    for i, x in enumerate(encoded.features):
        out = reducer(encoded.tokens([i], reducer.signals), max(1, int(keep * len(x) + 0.5)))
        real = out.anchors[0] if out.valid is None else out.anchors[0][out.valid[0]]
        rows = x[real] if out.features is None else out.features[0][: len(real)]
        stays.append(torch.zeros(len(x), dtype=torch.bool).index_fill(0, real, True))
        new.append(x.index_copy(0, real, rows.to(x.dtype)))
    read = getattr(model.base_model, f"get_{kind}_features")
    names = {"pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw"}
    plain = read(**{name: x for name, x in inputs.items() if name in names}, return_dict=True)
    flat = torch.cat(new)
    pooled = plain.pooler_output
    assert torch.equal(torch.cat(encoded.features), torch.cat([x.flatten(0, -2) for x in pooled]))
    whole = isinstance(pooled, torch.Tensor)
    features = flat.view_as(pooled) if whole else list(flat.split([len(x) for x in pooled]))
    out = BaseModelOutputWithPooling(pooler_output=features)
    if getattr(plain, "deepstack_features", None) is not None:
        out.deepstack_features = plain.deepstack_features
    seen = mask.bool().masked_scatter(ids == tiny.token, torch.cat(stays))
    places = model._prepare_position_ids_for_generation(ids, dict(inputs))
    kept = {name: x for name, x in inputs.items() if name.endswith("token_type_ids")}
    return (
        {"input_ids": ids, "attention_mask": seen.long(), "position_ids": places}
        | kept
        | {"mm_encoder_outputs": {kind: out}}
    )


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ALL)
def test_keeping_all_is_bit_identical(family):
    tiny = model_of(family)
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    logits = tiny.model(**tiny.inputs).logits
    for name, reducer in reducers().items():
        if name in ("uneven", "random", "grid"):
            with attach(tiny.model, reducer, keep=1.0):
                out = tiny.model.generate(**tiny.inputs, **GREEDY)
                assert torch.equal(tiny.model(**tiny.inputs).logits, logits)
            assert torch.equal(out.sequences, plain.sequences)
            assert gap(out, plain) == 0


@pytest.mark.parametrize("reducer", [*reducers()])
@pytest.mark.parametrize("family", ALL)
def test_dropping_equals_hiding(family, reducer):
    tiny, method = model_of(family), reducers()[reducer].eval()
    reference = hidden(tiny, tiny.inputs, method, KEEP)
    expected = tiny.model.generate(**reference, **GREEDY)
    prefill = tiny.model(**hidden(tiny, tiny.inputs, method, KEEP)).logits
    with attach(tiny.model, method, keep=KEEP) as attached:
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
        logits = tiny.model(**tiny.inputs).logits
    seen = attached.logical.selected
    assert 0 < attached.stats.kept < attached.stats.total == int((tiny.inputs["input_ids"] == tiny.token).sum())
    assert gap(out, expected) < TOLERANCE
    assert torch.equal(out.sequences, expected.sequences)
    assert float((logits - prefill)[seen].abs().max()) < TOLERANCE
