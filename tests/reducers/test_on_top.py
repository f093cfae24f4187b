"""Modifiers: what they change, what they pass on, and how they are joined."""

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.ops.clusters import distinctive_tokens
from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens


def test_a_modifier_takes_on_what_lies_beneath():
    reducer = create("centre", on="pyramiddrop")
    assert (reducer.kind, reducer.site, reducer.signals) == ("select", "decoder", {"last"})
    assert reducer.stages(32, 576, 72) == create("pyramiddrop").stages(32, 576, 72)
    assert create("restore", on="centre+sink_mask+scope").signals == {"cls", "encoder"}
    assert create("restore", on="scope").kind == "resample"


def test_options_go_to_the_reducer_beneath():
    reducer = create("restore", on="centre+scope", options={"alpha": 0.5})
    assert reducer.inner.inner.config.alpha == 0.5
    with pytest.raises(UserError, match="scope: unknown option 'alfa'"):
        create("centre", on="scope", options={"alfa": 1})
    with pytest.raises(UserError, match="unknown reducer 'scop'"):
        create("centre", on="scop")


def test_centre_compares_what_is_left_without_the_mean(made):
    tokens = made(create("divprune"))
    shifted = VisualTokens(tokens.features + 50, tokens.grid)
    expected = create("divprune")(VisualTokens(tokens.features - tokens.features.mean(1, keepdim=True), tokens.grid), 6)
    assert torch.equal(create("centre", on="divprune")(tokens, 6).kept_indices, expected.kept_indices)
    assert torch.equal(create("centre", on="divprune")(shifted, 6).kept_indices, expected.kept_indices)


def test_centre_gives_means_their_mean_back(made):
    tokens = made(create("pool"))
    torch.testing.assert_close(create("centre", on="pool")(tokens, 6).features, create("pool")(tokens, 6).features)


def test_centre_reaches_the_towers_features(made):
    tokens = made(create("scope"))
    moved = {**tokens.signals, "encoder": tokens.signals["encoder"] - tokens.signals["encoder"].mean(1, keepdim=True)}
    expected = create("scope")(VisualTokens(tokens.features, tokens.grid, moved), 6)
    assert torch.equal(create("centre", on="scope")(tokens, 6).kept_indices, expected.kept_indices)


@pytest.mark.parametrize(("on", "keep"), [("fastervlm", 5), ("fopru", 5), ("fastv", 5)])
def test_sinks_rank_last_for_attention(on, keep, made):
    reducer = create("sink_mask", on=on, threshold=2.3)
    tokens = made(reducer)
    tokens.features[:, 7] = torch.tensor([9.0, 0, 0, 0, 0, 0])  # |x| / rms = sqrt(6) = 2.449
    for name in reducer.signals:
        tokens.signals[name][:, 7] = 1.0
    assert all(7 in row for row in create(on)(tokens, keep).kept_indices.tolist())
    assert all(7 not in row for row in reducer(tokens, keep).kept_indices.tolist())
    spared = create("sink_mask", on=on, threshold=2.3, dims="1,2")
    assert all(7 in row for row in spared(tokens, keep).kept_indices.tolist())


@pytest.mark.parametrize(("keep", "below"), [(1, 0), (2, 1), (9, 4), (16, 8)])
def test_restore_keeps_half_and_merges_the_others_around_distinctive_anchors(keep, below, made):
    reducer = create("restore", on="fastervlm")
    tokens = made(reducer)
    reduction = reducer(tokens, keep)
    chosen = torch.zeros(3, 24, dtype=torch.bool)
    if below:
        chosen.scatter_(1, create("fastervlm")(tokens, below).kept_indices, True)
    peaks, assignment = distinctive_tokens(tokens.features, ~chosen, torch.full((3,), keep - below))
    assert torch.equal(reduction.kept_indices, (chosen | peaks).nonzero()[:, 1].view(3, keep))
    assert reduction.size.sum(1).tolist() == [24] * 3, "every token is in one of them"
    for image in range(3):
        for number, anchor in enumerate(reduction.kept_indices[image].tolist()):
            members = [
                n for n in range(24) if (n == anchor if chosen[image, anchor] else assignment[image, n] == anchor)
            ]
            expected = tokens.features[image, members].mean(0)
            torch.testing.assert_close(reduction.features[image, number], expected)
            assert reduction.size[image, number] == len(members)


def test_restore_leaves_selected_tokens_as_they_are_to_the_bit(made):
    reducer = create("restore", on="fastervlm")
    tokens = made(reducer, dtype=torch.bfloat16)
    reduction, chosen = reducer(tokens, 8), create("fastervlm")(tokens, 4).kept_indices
    for image in range(3):
        for anchor in chosen[image].tolist():
            place = reduction.kept_indices[image].tolist().index(anchor)
            assert torch.equal(reduction.features[image, place], tokens.features[image, anchor])


def test_restore_fills_up_where_fewer_were_selected(made):
    reducer = create("restore", on="prumerge", options={"adaptive": True}, gamma=0.9)
    reduction = reducer(made(reducer), 20)
    assert reduction.kept_indices.shape == (3, 20)
    assert reduction.size.sum(1).tolist() == [24] * 3
