"""A prompt that ends with its image: the answer begins at its last token, which therefore stays."""

import pytest
import torch
from families import build, one
from hidden import Hidden

from lit_reduce.reducer import Reducer
from lit_reduce.runtime import attach
from lit_reduce.tokens import Reduction, VisualTokens

GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


class First(Reducer):
    """Keeps the first tokens of an image, before layer 1 and fewer before layer 3."""

    name, site = "first", "decoder"

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {1: keep + 2, 3: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        return Reduction(torch.arange(keep).expand(len(tokens.features), -1))


class FirstAndLast(First):
    """The same with the last one, as the reference keeps it."""

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {1: keep + 3, 3: keep + 1}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        return Reduction(torch.tensor([[*range(keep - 1), tokens.count - 1]]).expand(len(tokens.features), -1))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_last_token_stays_where_it_is_visual(family):
    tiny = build(family)
    inputs = one(tiny, 1)
    end = int((inputs["input_ids"][0] == tiny.token).nonzero().max()) + 1
    inputs |= {name: x[:, :end] for name, x in inputs.items() if name.endswith(("input_ids", "_mask", "type_ids"))}
    tiny = type(tiny)(tiny.model, inputs, tiny.token)
    with attach(tiny.model, First(), keep=2):
        out = tiny.model.generate(**inputs, **GREEDY)
        logits = tiny.model(**inputs).logits[:, -1]
    with Hidden(tiny, FirstAndLast(), keep=2):
        expected = tiny.model.generate(**inputs, **GREEDY)
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, expected.logits, strict=True)) < 1e-4
    assert float((logits - expected.logits[0]).abs().max()) < 1e-4
