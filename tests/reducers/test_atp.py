"""ATP: its equations by slow loops, its budgets, its masks against its drops, and what training does to it."""

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.student import student_logits
from lit_reduce.distill.teacher import Teacher
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach
from lit_reduce.settings.train import DataSettings, TrainSettings
from lit_reduce.tokens import Course, VisualTokens

GRID, COUNT = (1, 4, 6), 24


def make(noise: float = 0.4, seed: int = 0, **options: Any) -> Any:
    """Fresh, plus noise: what starts at zero would hide what it does."""
    torch.manual_seed(seed)
    reducer = create("atp", **{"hidden_size": 6, "sites": [0.0, 0.3, 0.6], **options}).eval()
    for weight in reducer.parameters():
        weight.data += noise * torch.randn_like(weight)
    return reducer


def at(tokens: VisualTokens, layer: int, spent: list[float], keep: int = 8, progress: float | None = None) -> Any:
    """The same tokens between the layers of a decoder of ten."""
    return dataclasses.replace(tokens, layer=layer, course=Course(10, COUNT, keep, torch.tensor(spent), progress))


@torch.no_grad()
def margins_by_loop(reducer: Any, tokens: Any, image: int, site: int, part: float) -> list[float]:
    """Equations 3 to 11 for one image in Python's own numbers."""
    double = {name: x[image].double() for name, x in tokens.signals.items() if name != "text_mask"}
    real = tokens.signals["text_mask"][image]
    received = [
        [sum(float(rows[r, n]) for r in range(len(rows)) if mask[r]) for n in range(COUNT)]
        for rows, mask in ((double["image_rows"], [True] * 7), (double["text_rows"], real))
    ]
    own, cross = ([x / max(row) for x in row] for row in received)
    gate = double["gate"].tolist()

    def spread(scores: list[float]) -> float:
        held = [s * g for s, g in zip(scores, gate, strict=True)]
        parts = [x / sum(held) for x in held]
        wide = math.prod(part**-part for part in parts)  # the exponential of the entropy is a product of powers
        return math.log(2 * wide / sum(gate))

    read = [math.log(8 / COUNT)]
    head = reducer.heads[site].double()
    more, bar = head.outer(torch.nn.functional.gelu(head.inner(torch.tensor(read, dtype=torch.float64)))).tolist()
    reducer.heads[site].float()
    red = []
    for n in range(COUNT):
        x = tokens.features[image, n].double()
        factor = float(reducer.factors[site].double() @ (x / (x.square().mean() + 1e-6).sqrt()))
        red.append(math.log((own[n] + cross[n]) / 2) + factor)
    more += reducer.config.lean * spread(cross) if site == 0 else 0.0
    stay = 1 / (1 + math.exp(-more) * (1 - part) / part)
    order, need = sorted(range(COUNT), key=lambda n: -red[n]), stay * sum(gate)
    knots = [red[order[0]]]
    knots += [(red[a] + red[b]) / 2 for a, b in itertools.pairwise(order)] + [red[order[-1]] - 1]
    passed = 0.0
    for rank, n in enumerate(order):
        if passed + gate[n] >= need:
            theta = knots[rank] + (need - passed) / gate[n] * (knots[rank + 1] - knots[rank])
            break
        passed += gate[n]
    found = []
    for n in range(COUNT):
        row, column = int(double["place"][n]) // 6, int(double["place"][n]) % 6
        grids = [1 - 3 / s**2 for s in (2, 3, 4, 6) if row % s == s // 2 and column % s == s // 2]
        spatial = math.log(max(grids, default=1e-6) * (1 + math.exp(-bar)))
        found.append(max(red[n] - theta, spatial))
    return found


def meant(reducer: Any, site: int) -> float:
    """The part of the tokens that the schedule leaves at a site."""
    counts = [COUNT, *reducer.stages(10, COUNT, 8).values()]
    return counts[site + 1] / counts[site]


@pytest.mark.parametrize("site", [0, 1, 2])
def test_a_token_stays_above_either_threshold(site, made):
    reducer = make(noise=0.3, seed=4, lean=3.0)
    spent = [0.0, 0.0, 0.0] if site == 0 else [30.0, 45.0, 40.0]
    tokens = at(made(reducer, grid=GRID), [0, 3, 6][site], spent)
    rows = tokens.signals["text_rows"]  # the second and third question look at fewer tokens
    tokens.signals["text_rows"] = torch.stack([row ** (1 + 2 * b) for b, row in enumerate(rows)])
    reduction = reducer(tokens, 5)
    kept = []
    for image in range(3):
        expected = margins_by_loop(reducer, tokens, image, site, meant(reducer, site))
        torch.testing.assert_close(reduction.scores[image].double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)
        above = [n for n in range(COUNT) if expected[n] > 0] or [max(range(COUNT), key=lambda n: expected[n])]
        assert reduction.kept_indices[image][reduction.valid[image]].tolist() == above
        kept.append(len(above))
    assert len(set(kept)) > 1 or site, "all images alike would prove little"


def test_masks_are_the_larger_of_two_and_losses_are_those_of_the_equations(made):
    reducer = make(target=3.0, deep=0.5, softness=[0.4, 0.1])
    tokens = made(reducer, grid=GRID)
    tokens.signals["gate"] = torch.rand(3, COUNT, generator=torch.Generator().manual_seed(1))
    spent = [61.5, 60.25, 52.0]
    soft = reducer(at(tokens, 6, spent, progress=0.5), 5)
    late, means = 0.0, []
    for image in range(3):
        margins = margins_by_loop(reducer, tokens, image, 2, meant(reducer, 2))
        masks = [1 / (1 + math.exp(-m / 0.2)) for m in margins]  # half way from 0.4 to 0.1 in equal factors
        gates = tokens.signals["gate"][image].tolist()
        carried = [n for n in range(COUNT) if masks[n] * gates[n] > 1e-3]
        assert soft.kept_indices[image][soft.valid[image]].tolist() == carried
        found = soft.gate[image][soft.valid[image]].double()
        torch.testing.assert_close(found, torch.tensor([masks[n] for n in carried]).double(), atol=1e-4, rtol=0)
        now = sum(m * g for m, g in zip(masks, gates, strict=True))
        means.append((spent[image] + 4 * now) / 10)
        late += 0.5 * 0.6 * now / COUNT / 3
    assert soft.losses["target"].tolist() == pytest.approx([(mean - 8) / COUNT for mean in means], abs=1e-4)
    assert float(soft.losses["deep"].detach().sum() / 3) == pytest.approx(late, abs=1e-4)
    assert set(reducer(at(tokens, 3, spent, progress=0.5), 5).losses) == {"deep"}


@torch.no_grad()
def test_untrained_it_keeps_more_where_the_words_look_at_more(made):
    tokens = made(create("atp", hidden_size=6), grid=GRID)
    rows = torch.full_like(tokens.signals["text_rows"], 1 / COUNT)
    rows[1, :, 12:] /= 1e4  # the second question looks at half of the picture, the third at a sixth
    rows[2, :, 4:] /= 1e4
    tokens.signals["text_rows"] = rows
    counts = {}
    for lean in (0.0, 1.0):
        reducer = create("atp", hidden_size=6, sites=[0.0, 0.6], lean=lean).eval()
        counts[lean] = reducer(at(tokens, 0, [0.0] * 3, keep=8), 8).valid.sum(1).tolist()
    assert len(set(counts[0.0])) == 1
    assert counts[1.0][0] > counts[1.0][1] == counts[0.0][0] > counts[1.0][2]


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
@torch.no_grad()
def test_a_fixed_budget_is_met_by_every_image_and_shared_as_thresholds_say(name):
    tiny = build(name)
    whole, shares = None, set()
    for seed in range(3):
        reducer = make(noise=0.2, seed=seed, hidden_size=32, adaptive=False, lean=0.0)
        with attach(tiny.model, reducer, keep=0.5) as attached:
            tiny.model(**tiny.inputs)
        whole = attached.prompt_map.total
        for mean, total in zip(attached.prompt_map.per_layer, whole, strict=True):
            keep = math.floor(total / 2 + 0.5)
            assert keep - 0.41 < mean <= keep + 1e-6  # the last two of five layers can't share an odd token
        shares.add(attached.stats.layers)
    assert len(shares) == 3


@torch.no_grad()
def test_adaptive_counts_differ_and_follow_the_budget():
    tiny, reducer = build("llava"), make(noise=0.1, hidden_size=32, sites=[0.0, 0.4])
    means = []
    for keep in (4, 12, 24):
        with attach(tiny.model, reducer, keep=keep) as attached:
            tiny.model(**tiny.inputs)
        means.append(sum(attached.prompt_map.per_layer) / 3)
        assert attached.stats.layers[0] == round(
            sum(attached.prompt_map.per_layer) * 5 - sum(attached.stats.layers[1:])
        )
    assert means[0] < means[1] < means[2]


@pytest.fixture
def batch(tiny: Backbone, pictures: list[Any]) -> Batch:
    teacher, turns = Teacher(tiny, [2]), (("what is the red w30 here ?", "w40 w41"), ("is big ?", "w50"))
    groups = [Group(f"g{i}", picture.copy, turns) for i, picture in enumerate(pictures[:2])]
    return make_batch([(teacher.outputs(group), [0, 1]) for group in groups])


def settings(folder: Path, **changes: Any) -> TrainSettings:
    base = {"output": str(folder), "data": DataSettings(cache=None), "guide_steps": 0, "steps": 60, "warmup": 2}
    return TrainSettings(**{**base, "budgets": [14, 14], "val_budgets": [14], **changes})


@pytest.mark.parametrize("cross", ["text", "last"])
def test_soft_equals_hard_when_masks_are_sharp(tiny: Backbone, batch: Batch, cross: str) -> None:
    reducer = make(noise=0.05, hidden_size=32, softness=[1e-7, 1e-7], cross=cross)
    with torch.no_grad():
        hard, labels, _ = student_logits(tiny.model, reducer, batch, 14)
        soft, same, _ = student_logits(tiny.model, reducer, batch, 14, progress=0.3)
        other, *_ = student_logits(tiny.model, reducer, batch, 13)
    assert torch.equal(labels, same)
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=0)
    assert (hard - other).abs().max() > 1e-2


def test_the_budget_is_that_of_the_batch_however_many_calls(tiny: Backbone, batch: Batch, tmp_path: Path) -> None:
    reducer = make(noise=0.2, hidden_size=32, target=5.0, softness=[0.05, 0.05], lean=20.0).train()
    module, said = Distiller(tiny.model, reducer, settings(tmp_path)), list[Tensor]()
    reducer.register_forward_hook(lambda _, __, made: said.append(made.losses.get("target", torch.zeros(0))))
    for bias in range(0, -60, -1):  # until some questions are above the budget, and others below
        said.clear()
        reducer.heads[0].outer.bias.data[0] = bias / 4
        losses = module.losses(batch)
        rows = [row for call in said for row in call.tolist()]
        if min(rows) < -0.01 and max(rows) > 0.01:
            break
    assert len(rows) == 4
    assert sum(len(call) > 0 for call in said) > 1, "one call would prove nothing"
    expected = abs(statistics.mean(rows))
    assert expected < statistics.mean(map(abs, rows)) - 0.005, "all on one side would prove nothing"
    assert float(losses["target"].detach()) == pytest.approx(5 * expected, abs=1e-5)


def test_training_moves_every_weight_and_the_mean_count_to_the_budget(
    tiny: Backbone, batch: Batch, tmp_path: Path
) -> None:
    reducer = make(noise=0.0, hidden_size=32, target=5.0).train()
    with torch.no_grad():
        for head in reducer.heads:  # far too open
            head.outer.bias[0] = 3.0
    start = {name: x.clone() for name, x in reducer.state_dict().items()}
    module = Distiller(tiny.model, reducer, settings(tmp_path))
    optimizer = torch.optim.Adam(reducer.parameters(), lr=0.05)
    gaps = []
    for step in range(60):
        losses = module.losses(dataclasses.replace(batch, step=step))
        assert set(losses) == {"loss", "kl", "ce", "target", "deep"}
        parts = losses["kl"] + 0.5 * losses["ce"] + losses["target"] + losses["deep"]
        torch.testing.assert_close(losses["loss"], parts)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        gaps.append(float(losses["target"].detach()))
    assert min(gaps[-10:]) < 0.25 * gaps[0]
    assert {name for name, x in reducer.state_dict().items() if not torch.equal(x, start[name])} == set(start)
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_options_that_cannot_work_are_refused() -> None:
    for wrong in ({"sites": []}, {"sites": [1.0]}, {"softness": [0.5]}, {"softness": [0.5, 0.0]}, {"cross": "all"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            create("atp", hidden_size=6, **wrong)


def test_a_budget_that_the_first_layers_exceed_is_refused(tiny: Backbone) -> None:
    with pytest.raises(UserError, match="see all 36 tokens"):
        attach(tiny.model, create("atp", hidden_size=32, sites=[0.5]), keep=4)


@torch.no_grad()
def test_before_the_first_layer_its_own_attention_is_read_ahead() -> None:
    """Against the whole map of the eager model; and nothing of it stays."""
    seen: list[dict[str, Tensor]] = []

    class Reading(Reducer):
        name, site, signals = "reading", "decoder", frozenset({"image_rows", "text_rows", "last"})

        def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
            return {0: keep}

        def reduce(self, tokens: VisualTokens, keep: int) -> Any:
            seen.append(dict(tokens.signals))
            return create("grid").reduce(tokens, keep)

    for family in ("llava", "qwen2_5_vl"):
        tiny, eager = build(family), build(family, "eager")
        maps = eager.model(**tiny.inputs, output_attentions=True).attentions[0].mean(1)
        with attach(tiny.model, Reading(), keep=0.5):
            tiny.model(**tiny.inputs)
        ids, real = tiny.inputs["input_ids"], tiny.inputs["attention_mask"].bool()
        runs = [run for b in range(2) for run in _runs(ids[b] == tiny.token, b)]
        got = [rows for one in seen for rows in one["image_rows"]]
        assert len(got) == len(runs) == 3
        wanted = [maps[b][columns][:, columns] for b, columns in runs]
        for rows in got:
            assert any(rows.shape == w.shape and torch.allclose(rows, w, atol=1e-5) for w in wanted)
        for one in seen:
            words = one["text_rows"].sum(1)
            text = [maps[b][real[b] & (ids[b] != tiny.token)][:, columns].sum(0) for b, columns in runs]
            assert all(any(w.shape == t.shape and torch.allclose(w, t, atol=1e-5) for t in text) for w in words)
        seen.clear()


def _runs(visual: Tensor, row: int) -> list[tuple[int, Tensor]]:
    places = visual.nonzero()[:, 0]
    return [(row, run) for run in places.tensor_split(((places.diff() > 1).nonzero()[:, 0] + 1).tolist())]
