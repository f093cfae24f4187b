"""What the controls, FasterVLM and DivPrune keep."""

import torch

from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens


def make(batch=3, rows=4, columns=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns
    features = torch.randn(batch, count, 5, generator=generator).to(dtype)
    return VisualTokens(features, (1, rows, columns), {"cls": torch.rand(batch, count, generator=generator).to(dtype)})


def test_random_depends_on_the_seed_and_grows_by_adding():
    tokens = make()
    sets = [{*create("random", seed=seed)(tokens, 8).kept_indices[0].tolist()} for seed in range(5)]
    assert len({frozenset(chosen) for chosen in sets}) == 5
    assert {*create("random", seed=0)(tokens, 5).kept_indices[0].tolist()} < sets[0]


def test_random_is_uniform_over_seeds():
    tokens = make(batch=1)
    counts = torch.zeros(24)
    for seed in range(600):
        counts[create("random", seed=seed)(tokens, 6).kept_indices[0]] += 1
    # Binomial(600, 1/4): mean 150, deviation 10.6; five deviations either way.
    assert counts.min() > 97
    assert counts.max() < 203


def test_fastervlm_keeps_what_the_cls_token_attends_to():
    tokens = make()
    reduction = create("fastervlm")(tokens, 4)
    for image in range(3):
        order = sorted(range(24), key=lambda n: -tokens.signals["cls"][image, n].item())
        assert reduction.kept_indices[image].tolist() == sorted(order[:4])


def test_divprune_finds_one_token_of_each_group():
    centres = torch.eye(5)
    features = torch.stack([centres[n % 5] * (1 + n) + 0.01 * torch.sin(torch.arange(5.0) + n) for n in range(24)])
    kept_indices = create("divprune")(VisualTokens(features[None], (1, 4, 6)), 5).kept_indices[0]
    assert {n % 5 for n in kept_indices.tolist()} == set(range(5))


def test_pool_reports_who_went_where():
    tokens = make()
    reduction = create("pool")(tokens, 6)
    for image in range(3):
        for cell in range(6):
            members = tokens.features[image][reduction.assignment[image] == cell]
            torch.testing.assert_close(reduction.features[image, cell], members.mean(0))
            assert reduction.assignment[image, reduction.kept_indices[image, cell]] == cell


def test_grid_and_pool_share_their_cells():
    tokens = make()
    assert torch.equal(create("grid")(tokens, 6).kept_indices, create("pool")(tokens, 6).kept_indices)
