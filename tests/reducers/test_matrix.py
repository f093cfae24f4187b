"""What every reducer promises, whatever its method: a reducer is tested by being registered."""

import dataclasses
import itertools

import pytest
import torch
from smallest import LEARNED, shake, smallest

from lit_reduce.errors import UserError
from lit_reduce.reducer import KINDS, SITES, Reducer, available, create
from lit_reduce.runtime.call import call_reducer
from lit_reduce.tokens import VisualTokens

FREE = [name for name, cls in available().items() if not cls.trained and cls.__module__.startswith("lit_reduce.")]
# Settings that take another way through the method.
VARIANTS = [
    ("hiprune", {"parity": "official"}),
    ("fopru", {"strategy": "row"}),
    ("fourier", {"parity": "official"}),
    ("hired", {"overview": "last"}),
    ("globalcom2", {"overview": "last"}),
    ("cdpruner", {"parity": "official"}),
    ("cdpruner", {"theta": 0.5}),
    ("scope", {"mode": "plus", "heads": 2}),
    ("visionzip", {"parity": "official", "heads": 2}),
    ("prumerge", {"neighbours": 3}),
    ("centre", {"on": "divprune"}),
    ("centre", {"on": "visionzip"}),
    ("sink_mask", {"on": "scope", "threshold": 1.8}),
    ("restore", {"on": "cdpruner"}),
    ("restore", {"on": "centre+vispruner", "gamma": 0.3}),
    ("restore", {"on": "pyramiddrop"}),
]
# Methods whose count follows from the picture: at most K stay.
COUNTED = [("prumerge", {"adaptive": True}), ("prumerge_plus", {"adaptive": True}), ("hired", {"parity": "official"})]
WIDTH, TOWER = 6, 8  # of the tokens that `made` makes
HALVING = ("tome", "turbo")  # one call merges pairs, so at least half of the tokens stay
# Learned reducers stand here with random weights and, from the register, in their smallest form; these are other ways.
LEARNED_VARIANTS = [
    ("covipal", {"summary": 2}),
    ("packer", {"text": False, "levels": []}),
    ("flexattention", {"short": "divprune"}),
    ("atp", {"cross": "last", "residual": False}),
]
ALL = [(name, {}) for name in (*FREE, *LEARNED)] + VARIANTS + COUNTED + LEARNED_VARIANTS
GRIDS = [(1, 4, 6), (5, 3, 3), (2, 3, 4)]

each = pytest.mark.parametrize(("name", "options"), ALL, ids=lambda x: str(x) if x else "")


def build(name: str, options: dict) -> Reducer:
    """The reducer, of the sizes that `made` makes; inside the tower its tokens are as wide as what comes out of it."""
    if name not in LEARNED:
        return create(name, **options).eval()
    tower = WIDTH if available()[name].site == "encoder" else TOWER
    reducer = smallest(name, {"hidden_size": WIDTH, "vision_hidden_size": tower, "depth": 4}, **options)
    return shake(reducer, 0.5).requires_grad_(False)


def within(name: str, keep: int, tokens: VisualTokens) -> int:
    """A budget that the method can meet in one call."""
    return max(keep, -(-tokens.count // 2)) if name in HALVING else keep


@each
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", [1, 2, 7, 17, 23])
def test_exactly_k_tokens_stay_in_raster_order(name, options, grid, keep, made):
    reducer = build(name, options)
    tokens = made(reducer, grid=grid)
    keep = within(name, keep, tokens)
    reduction = reducer(tokens, keep)
    kept_indices = reduction.kept_indices
    assert kept_indices.shape == (3, keep)
    assert kept_indices.dtype == torch.int64
    valid = torch.ones_like(kept_indices, dtype=torch.bool) if reduction.valid is None else reduction.valid
    assert valid[:, 0].all()
    assert (name, options) in COUNTED or valid.all()
    assert torch.all((kept_indices[:, 1:] > kept_indices[:, :-1]) | ~valid[:, 1:])
    assert torch.all(valid[:, :-1] | ~valid[:, 1:]), "what is not valid must come last"
    assert kept_indices.min() >= 0
    assert kept_indices.max() < tokens.count
    assert reduction.gather(tokens).shape == (3, keep, tokens.features.shape[-1])
    assert reduction.gather(tokens).dtype == tokens.features.dtype
    assert torch.isfinite(reduction.gather(tokens)).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_its_samples_one_by_one(name, options, dtype, made):
    reducer = build(name, options)
    for grid in GRIDS:
        tokens = made(reducer, grid=grid, dtype=dtype, batch=4)
        together = call_reducer(reducer, tokens, within(name, 7, tokens))  # weights keep their own precision
        torch.manual_seed(123)  # the global random stream must not matter
        for sample in range(4):
            signals = {key: x[sample : sample + 1] for key, x in tokens.signals.items()}
            alone = VisualTokens(tokens.features[sample : sample + 1], grid, signals, tokens.layer)
            single = call_reducer(reducer, alone, within(name, 7, tokens))
            assert torch.equal(single.kept_indices[0], together.kept_indices[sample])
            for field in ("features", "valid", "assignment", "size", "memory"):
                one, many = getattr(single, field), getattr(together, field)
                assert (one is None) == (many is None)
                if one is not None:
                    torch.testing.assert_close(one[0], many[sample], atol=1e-6, rtol=1e-6)


@each
def test_longer_padding_of_a_prompt_changes_nothing(name, options, made):
    reducer = build(name, options)
    tokens = made(reducer)
    if "text_mask" not in tokens.signals:
        pytest.skip("reads no prompt")
    longer = {**tokens.signals, "text_mask": torch.nn.functional.pad(tokens.signals["text_mask"], (0, 3))}
    if "text" in longer:
        longer["text"] = torch.nn.functional.pad(longer["text"], (0, 0, 0, 3), value=9.0)
    if "text_rows" in longer:
        longer["text_rows"] = torch.nn.functional.pad(longer["text_rows"], (0, 0, 0, 3), value=9.0)
    again = reducer(VisualTokens(tokens.features, tokens.grid, longer, tokens.layer), within(name, 7, tokens))
    assert torch.equal(again.kept_indices, reducer(tokens, within(name, 7, tokens)).kept_indices)


@each
def test_keeping_all_is_the_identity(name, options, made):
    reducer = build(name, options)
    tokens = made(reducer)
    reduction = reducer(tokens, 24)
    assert reduction.features is None
    assert reduction.kept_indices.tolist() == [list(range(24))] * 3
    assert torch.equal(reduction.gather(tokens), tokens.features)


@each
def test_calls_repeat_and_leave_inputs_and_the_callers_random_stream_alone(name, options, made):
    reducer = build(name, options)
    tokens = made(reducer)
    before = {key: x.clone() for key, x in tokens.signals.items()} | {"features": tokens.features.clone()}
    first = reducer(tokens, within(name, 6, tokens))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    second = reducer(tokens, within(name, 6, tokens))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.kept_indices, second.kept_indices)
    assert torch.equal(first.gather(tokens), second.gather(tokens))
    for key, x in before.items():
        assert torch.equal(tokens.features if key == "features" else tokens.signals[key], x), key


@each
def test_equal_tokens_are_chosen_alike_in_every_image(name, options, made):
    """With nothing to tell tokens apart rounding must not decide: the same places, each one once, for all images."""
    reducer = build(name, options)
    tokens = made(reducer)
    same = {key: x[:1, :1].expand_as(x) if x.ndim > 1 else x for key, x in tokens.signals.items()}
    same = {
        key: x[..., :1].expand_as(x) if key.startswith(("cls", "received", "last", "text_rows", "image_rows")) else x
        for key, x in same.items()
    }
    if "text_mask" in same:
        same["text_mask"] = torch.ones_like(tokens.signals["text_mask"])
    same_tokens = VisualTokens(torch.ones_like(tokens.features), tokens.grid, same, tokens.layer)
    reduction = reducer(same_tokens, within(name, 7, tokens))
    for row in reduction.kept_indices[1:]:
        assert torch.equal(row, reduction.kept_indices[0])


@each
def test_assignment_and_sizes_agree_with_the_anchors(name, options, made):
    reducer = build(name, options)
    for grid in GRIDS:
        tokens = made(reducer, grid=grid)
        keep = within(name, 7, tokens)
        reduction = reducer(tokens, keep)
        if reduction.assignment is not None:
            assert reduction.assignment.shape == (3, tokens.count)
            owners = reduction.assignment.gather(1, reduction.kept_indices)
            assert torch.equal(owners, torch.arange(keep).expand(3, -1)), "an anchor belongs to its own token"
        if reduction.size is not None:
            assert reduction.size.shape == (3, keep)
            if reduction.assignment is not None and "size" not in tokens.signals:
                counts = torch.nn.functional.one_hot(reduction.assignment.clamp_min(0), keep)
                counts = (counts * (reduction.assignment >= 0)[..., None]).sum(1)
                assert torch.equal(reduction.size.long(), counts)


@each
def test_newline_tokens_do_no_harm(name, options, made):
    reducer = build(name, options)
    tokens = made(reducer, extra=4)
    keep = within(name, 9, tokens)
    assert reducer(tokens, keep).kept_indices.shape == (3, keep)


@pytest.mark.parametrize("name", FREE)
def test_the_card_of_the_class_is_complete(name):
    cls, reducer = available()[name], create(name)
    assert cls.name == name
    assert cls.kind in KINDS
    assert cls.site in SITES
    assert cls.paper
    assert cls.__doc__
    assert not list(reducer.parameters())
    assert reducer.signals == cls.signals, "the list shows the signals of the default settings"
    for entry in dataclasses.fields(cls.config_class):
        assert entry.metadata.get("help"), f"{name}.{entry.name} says nothing"


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_reducer_says_how_it_is_tested(name):
    """Without `smallest` it would have no row in the shared matrices and in the training tests."""
    cls = available()[name]
    assert type(cls.smallest) is cls.config_class, (
        f"{cls.__qualname__} needs `smallest = {cls.config_class.__name__}(...)`"
    )
    assert sum(weight.numel() for weight in build(name, {}).parameters()) < 20_000, "smaller, so that tests stay fast"
    assert cls.paper
    assert cls.__doc__
    for entry in dataclasses.fields(cls.config_class):
        assert entry.metadata.get("help"), f"{name}.{entry.name} says nothing"


@each
def test_a_missing_signal_is_named(name, options, made):
    reducer = build(name, options)
    tokens = made(reducer)
    for signal in reducer.signals:
        rest = {key: x for key, x in tokens.signals.items() if key != signal}
        with pytest.raises(UserError, match=f"signal '{signal}' is missing"):
            reducer(VisualTokens(tokens.features, tokens.grid, rest, tokens.layer), 5)


INSIDE = [name for name in FREE if available()[name].site in ("encoder", "decoder")]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("depth", [4, 12, 23, 32])
@pytest.mark.parametrize("keep", [192, 128, 64, 575])
def test_stages_lie_in_the_model_fall_and_end_at_the_budget(name, depth, keep):
    stages = create(name).stages(depth, 576, keep)
    assert stages
    assert all(0 <= layer < depth for layer in stages)
    counts = [stages[layer] for layer in sorted(stages)]
    assert all(576 >= before >= after for before, after in itertools.pairwise([576, *counts]))
    assert counts[-1] == keep
