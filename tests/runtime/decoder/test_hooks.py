"""Reducers inside the language model equal the plain model that cannot see what they drop: every family, every mode.

The tables say what is tested: a new family is a row of tests/families.py, a new reducer a row of `REDUCERS`, a new way
of generating a row of `MODES`.
"""

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, VIDEO_FAMILIES, build
from hidden import Hidden

from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach
from lit_reduce.tokens import Reduction, VisualTokens

TOLERANCE, MATTERS = 1e-4, 1e-2
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CORE = ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3", "paligemma"]


class Mixing(Reducer):
    """Makes new tokens before layers 0 and 3, and another number of them for every image."""

    name, kind, site = "mixing", "resample", "decoder"

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {0: keep + 1, 3: keep - 1}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        score = tokens.features.sum(-1)
        counts = 1 + (score[:, :1].abs() * 1000).long() % keep
        last = tokens.count - 1
        kept_indices = score[:, :last].topk(keep, dim=1).indices.sort(1).values
        valid = torch.arange(keep) < counts
        x = tokens.features
        new = x.gather(1, kept_indices[..., None].expand(-1, -1, x.shape[-1])) + 0.3 * x.mean(1, keepdim=True)
        return Reduction(kept_indices.masked_fill(~valid, last), features=new, valid=valid)


class Skipping(Reducer):
    """Lets some tokens pass layers 1 and 3 by."""

    name, kind, site = "skipping", "skip", "decoder"

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {1: keep, 3: keep + 1}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        return Reduction(tokens.features.norm(dim=-1).topk(keep, dim=1).indices.sort(1).values)


class AllRows(Reducer):
    """Ranks by the text rows of a layer further up, in two stages."""

    name, site, signals = "all_rows", "decoder", frozenset({"text_rows@0", "last"})

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {2: keep + 2, 4: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        score = tokens.signal("text_rows@0").sum(1) + tokens.signal("last")
        return Reduction(score.topk(keep, dim=1).indices.sort(1).values)


def mod(**options) -> Reducer:
    """Routers that choose anew at each of the five layers, and weigh heavily."""
    reducer = create("mod", hidden_size=32, depth=5, alpha=0.5, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in reducer.parameters():
        weight.data.normal_(0, 0.5, generator=generator)
    return reducer


def atp() -> Reducer:
    """Thresholds that leave another count of each image, before layers 1 and 3."""
    reducer = create("atp", hidden_size=32, sites=[0.2, 0.6]).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in reducer.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return reducer


REDUCERS = {
    "fastv": lambda: {"decoder": create("fastv")},
    "pyramiddrop": lambda: {"decoder": create("pyramiddrop")},
    "lookm": lambda: {"cache": create("lookm")},
    "mixing": lambda: {"decoder": Mixing()},
    "skipping": lambda: {"decoder": Skipping()},
    "mod": lambda: {"decoder": mod()},
    "atp": lambda: {"decoder": atp()},
    "all_rows": lambda: {"decoder": AllRows()},
    "both": lambda: {"decoder": create("pyramiddrop", steps=1), "cache": create("lookm")},
}
KEEP = 4
KEEPS = {"atp": 0.6}  # the mean over layers, of which the first sees all
ROWS = [(family, name) for family in CORE for name in REDUCERS]
OTHERS = [family for family in [*FAMILIES, *VIDEO_FAMILIES] if family not in CORE]
ROWS += [(family, name) for family in OTHERS for name in ("fastv", "mixing")]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def budgets(reducers: dict[str, Reducer]) -> tuple[list[Reducer], list[int]]:
    """`both` evicts again what its decoder left."""
    return list(reducers.values()), [KEEP if len(reducers) == 1 or site == "decoder" else 3 for site in reducers]


EAGER = [("llava", "both"), ("qwen2_5_vl", "lookm"), ("qwen3_vl", "mixing"), ("gemma3", "all_rows")]
EAGER += [("paligemma", "skipping"), ("llava", "mod"), ("mistral3", "fastv")]  # the reduced model's own kernel as well
CASES = [(*row, "sdpa") for row in ROWS] + [(*row, "eager") for row in EAGER]


@pytest.mark.parametrize(("family", "name", "kernel"), CASES, ids=["-".join(case) for case in CASES])
def test_dropping_equals_hiding(family, name, kernel):
    tiny, reducers = build(family, kernel), REDUCERS[name]()
    inputs = tiny.inputs
    plain = tiny.model.generate(**inputs, **GREEDY)
    keep = KEEPS.get(name, KEEP)
    with attach(tiny.model, list(reducers.values()), keep=keep) as attached:
        out = tiny.model.generate(**inputs, **GREEDY)
        logits = tiny.model(**inputs).logits
    with Hidden(tiny, **reducers, keep=keep) as hidden:
        expected = tiny.model.generate(**inputs, **GREEDY)
        whole = tiny.model(**inputs).logits
        skips = any(reducer.kind == "skip" for reducer in reducers.values())
        gone = torch.zeros_like(hidden.gone[-1]) if skips else hidden.gone[-1]
    assert gap(out, expected) < TOLERANCE
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, plain) > MATTERS, "the reduction must matter, or the test proves nothing"
    seen = inputs["attention_mask"].bool() & ~gone
    assert float((logits - whole)[seen].abs().max()) < TOLERANCE
    assert not logits[gone].any() or getattr(tiny.model.lm_head, "bias", None) is not None
    total = int((inputs["input_ids"] == tiny.token).sum())
    assert attached.stats.total == total
    assert 0 < attached.stats.kept < total or skips
    assert len(attached.stats.layers) == 5
    assert attached.stats.reducer_ms > 0


class Noting(Reducer):
    """Notes where it is asked."""

    name = "noting"

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site, self.seen = site, set()

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return dict.fromkeys(range(depth), keep) if self.site == "cache" else {1: keep + 1, 2: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        self.seen.add(tokens.layer)
        return Reduction(torch.arange(keep).expand(len(tokens.features), -1))


@pytest.mark.parametrize("site", ["encoder", "projector", "decoder", "cache"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_reducer_is_told_its_layer(family, site):
    tiny, reducer = build(family), Noting(site)
    with attach(tiny.model, reducer, keep=4):
        tiny.model.generate(**tiny.inputs, **GREEDY)
    assert reducer.seen == {"projector": {-1}, "cache": {0, 1, 2, 3, 4}}.get(site, {1, 2})
