"""The reducers that every test here runs, and the model that reductions are compared with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lit_reduce.backbones import Backbone
from lit_reduce.reducer import Reducer, create
from lit_reduce.tokens import Reduction, VisualTokens

GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
KEEP = 10


class Uneven(Reducer):
    """Keeps another number of tokens of every image, spread by its content; a trained layer makes new features."""

    name, kind = "uneven", "resample"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mix = torch.nn.Linear(width, width)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        score = tokens.features.sum(-1)
        kept_indices = score.topk(keep, dim=1).indices
        counts = 1 + (score.abs().sum(1) * 100).long() % keep
        valid = torch.arange(keep) < counts[:, None]
        last = tokens.count - 1  # never kept, unless it is the only one: it marks the invalid entries
        kept_indices = kept_indices.masked_fill(~valid, last).sort(1).values
        valid = torch.arange(keep) < (kept_indices < last).sum(1, keepdim=True).clamp(min=1)
        x = tokens.features.gather(1, kept_indices[..., None].expand(-1, -1, tokens.features.shape[-1]))
        return Reduction(kept_indices, features=x + self.mix(x), valid=valid)


@pytest.fixture(params=["random", "pool", "fastervlm", "uneven"])
def reducer(request: pytest.FixtureRequest) -> Reducer:
    """Selects, merges, needs a signal, keeps uneven counts: one of each; `test_matrix` runs every reducer."""
    return (Uneven() if request.param == "uneven" else create(request.param)).eval()


@pytest.fixture
def uneven() -> Reducer:
    return Uneven().eval()


def signals(model: Any, pixels: Tensor) -> list[dict[str, Tensor]]:
    """The signals of each image, from an eager tower and without our code."""
    tower = model.base_model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(before)
    cls, encoder = out.attentions[-2].mean(1)[:, 0, 1:], out.hidden_states[-2][:, 1:]
    return [{"cls": cls[i : i + 1], "encoder": encoder[i : i + 1]} for i in range(len(pixels))]


def hidden_by_mask(model: Any, inputs: dict[str, Any], reducer: Reducer, keep: int) -> dict[str, Any]:
    """The full prompt, in which the mask hides what the reducer drops, one image at a time; positions as ever."""
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    stays, new = [], []
    for x, signal in zip(features, signals(model, inputs["pixel_values"]), strict=True):
        tokens = VisualTokens(x[None], (1, 6, 6), {name: signal[name] for name in reducer.signals})
        out = reducer(tokens, keep)
        real = out.kept_indices[0] if out.valid is None else out.kept_indices[0][out.valid[0]]
        rows = out.gather(tokens)[0][: len(real)]
        stays.append(torch.zeros(len(x), dtype=torch.bool).index_fill(0, real, True))
        new.append(x.index_copy(0, real, rows))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    seen = mask.bool().masked_scatter(ids == model.config.image_token_id, torch.cat(stays))
    return {
        "input_ids": ids,
        "attention_mask": seen.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=new)},
    }


@pytest.fixture
def reference(tiny: Backbone) -> Callable[..., dict[str, Any]]:
    """`hidden_by_mask` of the tiny model."""

    @torch.no_grad()
    def build(inputs: dict[str, Any], reducer: Reducer, keep: int = KEEP) -> dict[str, Any]:
        return hidden_by_mask(tiny.model, inputs, reducer, keep)

    return build


def gap(a: Any, b: Any) -> float:
    """The largest difference between the logits of two calls of ``generate``, over all steps."""
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.fixture
def helpers() -> Any:
    """Constants and functions that tests share."""

    class Helpers:
        greedy = GREEDY
        keep = KEEP

    Helpers.gap = staticmethod(gap)
    return Helpers
