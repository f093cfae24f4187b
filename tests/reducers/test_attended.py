"""Methods that follow attention, against loops that follow the papers."""

import math

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens


def descending(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda n: (-scores[n], n))


def cosine_of(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_vtc_cls_sums_its_layers(made):
    reducer = create("vtc_cls", layers="1, -1,0.5")
    assert reducer.signals == {"cls@1", "cls@-1", "cls@0.5"}
    tokens = made(reducer)
    total = sum(tokens.signals[name] for name in ("cls@1", "cls@-1", "cls@0.5"))
    expected = [sorted(descending(row)[:5]) for row in total.tolist()]
    assert reducer(tokens, 5).kept_indices.tolist() == expected


def test_vtc_cls_reads_layers_16_to_22_of_24_by_default():
    layers = create("vtc_cls").layers
    assert [int(float(layer) * 24) for layer in layers] == [16, 17, 18, 19, 20, 21, 22]


@pytest.mark.parametrize(("keep", "important"), [(192, 96), (128, 64), (64, 32), (58, 29), (7, 3)])
def test_vispruner_gives_half_to_attention_and_the_rest_to_what_differs(keep, important, made):
    reducer = create("vispruner")
    tokens = made(reducer, batch=1, grid=(1, 24, 24))
    got = reducer(tokens, keep).kept_indices[0].tolist()
    order = descending(tokens.signals["cls"][0].tolist())
    assert set(order[:important]) <= set(got)
    encoder = torch.nn.functional.normalize(tokens.signals["encoder"][0].double(), dim=-1)
    similarity, rest = (encoder @ encoder.T).tolist(), order[important:]
    while len(rest) > keep - important:
        drop = min(8, len(rest) - keep + important)
        even, odd = rest[0::2], rest[1::2]
        closest = [max(similarity[i][j] for j in odd) for i in even]
        rest = [even[i] for i in descending(closest)][drop:] + odd
    assert got == sorted(order[:important] + rest)


def hiprune_by_loop(middle: list[float], deep: list[float], keep: int, columns: int, wrap: bool) -> list[int]:
    kept_indices = descending(middle)[: round(keep * 0.1 / 5)]
    protected = set(kept_indices)
    for n in kept_indices:
        if wrap:  # index arithmetic, cut off at either end
            protected |= {min(max(m, 0), len(deep) - 1) for m in (n - columns, n + columns, n - 1, n + 1)}
            continue
        sides = [m for m in (n - 1, n + 1) if m // columns == n // columns]
        protected |= {m for m in [n - columns, n + columns, *sides] if 0 <= m < len(deep)}
    registers = [n for n in descending(deep) if n not in protected]
    return sorted([*protected, *registers[: keep - len(protected)]])


@pytest.mark.parametrize("parity", ["paper", "official"])
@pytest.mark.parametrize("keep", [64, 100, 200])
def test_hiprune_protects_anchors_and_neighbours(parity, keep, made):
    reducer = create("hiprune", parity=parity)
    tokens = made(reducer, grid=(1, 24, 24))
    middle, deep = tokens.signals["received@0.35"], tokens.signals["received"]
    middle[0, 23] = 1.0  # the last token of the first row
    got = reducer(tokens, keep).kept_indices.tolist()
    for image in range(3):
        wrap = parity == "official"
        expected = hiprune_by_loop(middle[image].tolist(), deep[image].tolist(), keep, 24, wrap)
        assert got[image] == expected


def test_hiprune_parity_shows_at_the_end_of_a_row(made):
    tokens = made(create("hiprune"), batch=1, grid=(1, 24, 24))
    tokens.signals["received@0.35"][0, 23] = 1.0
    tokens.signals["received"][0, 24] = -1.0
    assert 24 not in create("hiprune")(tokens, 50).kept_indices[0].tolist()
    assert 24 in create("hiprune", parity="official")(tokens, 50).kept_indices[0].tolist()


def visionzip_by_loop(x, attention, keys, dominant, contextual, added):
    count = len(x)
    first = sorted(descending(attention)[:dominant])
    rest = [n for n in range(count) if n not in first]
    targets = rest[:: len(rest) // contextual][:contextual]
    groups = {t: [] for t in targets}
    for n in rest:
        if n not in groups:
            groups[max(targets, key=lambda t: (cosine_of(keys[n], keys[t]), -t))].append(n)
    made = {n: x[n] for n in first}
    for t, members in groups.items():
        total = [math.fsum(x[m][d] for m in members) for d in range(len(x[0]))]
        if added:
            made[t] = [a + (b / len(members) if members else 0) for a, b in zip(x[t], total, strict=True)]
        else:
            made[t] = [(a + b) / (1 + len(members)) for a, b in zip(x[t], total, strict=True)]
    return sorted(made), [made[n] for n in sorted(made)]


@pytest.mark.parametrize(("keep", "split"), [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5))])
@pytest.mark.parametrize("parity", ["paper", "official"])
def test_visionzip_at_the_published_budgets(keep, split, parity, made):
    official = parity == "official"
    reducer = create("visionzip", parity=parity, heads=2 if official else 1)
    tokens = made(reducer, batch=1, grid=(1, 24, 24))
    keys = tokens.signals["keys"][0]
    keys = (keys[:, :4] + keys[:, 4:]) / 2 if official else keys
    reduction = reducer(tokens, keep)
    kept_indices, features = visionzip_by_loop(
        tokens.features[0].tolist(), tokens.signals["cls"][0].tolist(), keys.tolist(), *split,
        official,
    )  # fmt: skip
    assert reduction.kept_indices[0].tolist() == kept_indices
    torch.testing.assert_close(reduction.features[0], torch.tensor(features), atol=1e-5, rtol=1e-5)
    assert reduction.size.sum() == 576, "nothing is lost"


def test_official_code_needs_the_number_of_heads():
    with pytest.raises(UserError, match=r"visionzip: parity=official averages keys .*: give heads"):
        create("visionzip", parity="official")
    with pytest.raises(UserError, match=r"scope: mode=plus adds attention summed over .*: give heads"):
        create("scope", mode="plus")


def test_scope_adds_attention_summed_over_heads(made):
    """Token by token: the gain in coverage plus 4 heads times their mean attention, without chosen columns."""
    reducer = create("scope", mode="plus", heads=4)
    tokens = made(reducer)
    tokens.signals["cls"] = 20 * tokens.signals["cls"]
    for image, got in enumerate(reducer(tokens, 9).kept_indices.tolist()):
        unit = torch.nn.functional.normalize(tokens.signals["encoder"][image].double(), dim=-1)
        alike, attention = (unit @ unit.T).tolist(), tokens.signals["cls"][image].tolist()
        covered, chosen = [0.0] * 24, []
        for _ in range(9):
            gain = {
                n: sum(max(0, alike[i][n] - covered[i]) for i in range(24)) + 4 * attention[n]
                for n in range(24)
                if n not in chosen
            }
            chosen.append(max(gain, key=gain.get))
            covered = [max(c, alike[i][chosen[-1]]) for i, c in enumerate(covered)]
        assert got == sorted(chosen)


def test_visionzip_compares_the_mean_of_heads_where_asked(made):
    tokens = made(create("visionzip"))
    keys = tokens.signals["keys"]
    mean = {**tokens.signals, "keys": (keys[..., :4] + keys[..., 4:]) / 2}
    by_mean = create("visionzip")(VisualTokens(tokens.features, tokens.grid, mean), 9)
    assert torch.equal(create("visionzip", heads=2)(tokens, 9).features, by_mean.features)


def prumerge_by_loop(x, query, keys, kept, neighbours):
    """The published steps for chosen tokens: each takes its neighbours in, one more holds the rest."""
    logits = [math.fsum(a * b for a, b in zip(query, k, strict=True)) / math.sqrt(len(query)) for k in keys]
    powers = [math.exp(v - max(logits)) for v in logits]
    a = [v / math.fsum(powers) for v in powers]
    kept = kept(a)
    dropped = [n for n in range(len(x)) if n not in kept]
    made = {}
    for i in kept:
        near = sorted((n for n in range(len(x)) if n != i), key=lambda n: -cosine_of(keys[i], keys[n]))[:neighbours]
        made[i] = [x[i][d] + math.fsum(a[n] * x[n][d] for n in near) for d in range(len(x[0]))]
    extra = max(dropped, key=lambda n: a[n])
    made[extra] = [math.fsum(a[n] * x[n][d] for n in dropped) for d in range(len(x[0]))]
    return sorted(made), [made[n] for n in sorted(made)]


def check_prumerge(reducer, tokens, keep, kept):
    reduction = reducer(tokens, keep)
    for image in range(len(tokens.features)):
        kept_indices, features = prumerge_by_loop(
            tokens.features[image].tolist(), tokens.signals["cls_query@-1"][image].tolist(),
            tokens.signals["keys@-1"][image].tolist(), kept, reducer.config.neighbours,
        )  # fmt: skip
        real = slice(None) if reduction.valid is None else reduction.valid[image]
        assert reduction.kept_indices[image][real].tolist() == kept_indices
        torch.testing.assert_close(reduction.features[image][real], torch.tensor(features), atol=1e-5, rtol=1e-5)


def outliers(a: list[float]) -> int:
    low, high = torch.tensor(a).double().quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    return max(1, sum(v > high + 1.5 * (high - low) for v in a))


@pytest.mark.parametrize("keep", [2, 9, 23])
def test_prumerge_merges_into_the_most_attended(keep, made):
    reducer = create("prumerge", neighbours=5)
    check_prumerge(reducer, made(reducer), keep, lambda a: descending(a)[: keep - 1])


def test_prumerge_lets_the_picture_count(made):
    reducer = create("prumerge", adaptive=True)
    tokens = made(reducer, grid=(1, 6, 8))
    check_prumerge(reducer, tokens, 30, lambda a: descending(a)[: outliers(a)])
    counts = reducer(tokens, 30).valid.sum(1)
    assert len(set(counts.tolist())) > 1, "the pictures should differ, or nothing is tested"
    assert reducer(tokens, 4).valid.sum(1).max() <= 4


def test_prumerge_plus_adds_an_even_stride_of_the_rest(made):
    reducer = create("prumerge_plus")

    def kept(a):
        first = descending(a)[:4]
        rest = [n for n in range(48) if n not in first]
        return [*first, *(rest[int((i + 0.5) * 44 / 11)] for i in range(11))]

    check_prumerge(reducer, made(reducer, grid=(1, 6, 8)), 16, kept)


def test_prumerge_plus_lets_the_picture_count(made):
    reducer = create("prumerge_plus", adaptive=True)

    def kept(a):
        few = outliers(a)
        step = max(1, int(len(a) / few) // 3)
        return sorted({*descending(a)[:few], *range(0, len(a) - 1, step)})

    check_prumerge(reducer, made(reducer, grid=(1, 6, 8)), 47, kept)


def test_prumerge_plus_never_samples_the_last_token():
    """36 of 576 are outliers, so every fifth token joins them: 570 is the last, although 575 is a multiple of 5."""
    attention = torch.full((1, 576), 1e-3)
    attention[:, 1:37] = 1.0
    chosen = create("prumerge_plus", adaptive=True).choose(attention, 575)
    assert chosen[0].nonzero()[:, 0].tolist() == sorted({*range(1, 37), *range(0, 575, 5)})


def test_todre_starts_at_the_most_attended_token_of_the_overview(made):
    reducer = create("todre")
    tokens = made(reducer, grid=(5, 3, 3))
    assert reducer(tokens, 1).kept_indices[:, 0].tolist() == tokens.signals["cls@-1"][:, :9].argmax(-1).tolist()
    whole = made(reducer, grid=(1, 5, 9))
    assert reducer(whole, 1).kept_indices[:, 0].tolist() == whole.signals["cls@-1"].argmax(-1).tolist()


def test_scope_ignores_what_is_not_salient(made):
    reducer = create("scope")
    tokens = made(reducer)
    tokens.signals["cls"][:, 5:] = 0
    assert reducer(tokens, 5).kept_indices.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_dart_keeps_its_pivots_and_what_is_least_like_them(made):
    reducer = create("dart")
    tokens = made(reducer)
    got = reducer(tokens, 12).kept_indices.tolist()
    for image in range(3):
        x, text = tokens.features[image].tolist(), tokens.signals["text"][image].tolist()
        words = [t for t, real in zip(text, tokens.signals["text_mask"][image].tolist(), strict=True) if real]
        first = descending([sum(map(abs, token)) for token in x])[:4]
        strong = [words[i] for i in descending([sum(map(abs, word)) for word in words])[:4]]
        strong += [strong[0]] * (4 - len(strong))
        stay = list(first)
        for pivot in [*(x[n] for n in first), *strong]:
            free = sorted((n for n in range(24) if n not in stay), key=lambda n: cosine_of(x[n], pivot))
            stay += free[:1]
        assert got[image] == sorted(stay)


def test_cdpruner_without_any_relevance_is_a_plain_dpp_and_parity_turns_it_round(made):
    tokens = made(create("cdpruner"), batch=1)
    words = tokens.signals["text"][:, :1]
    features = torch.cat([words.expand(-1, 3, -1), -words.expand(-1, 21, -1)], 1) + 0.1 * tokens.features
    aligned = VisualTokens(features, tokens.grid, tokens.signals)
    assert create("cdpruner")(aligned, 3).kept_indices[0].tolist() == [0, 1, 2]
    assert not {0, 1, 2} & set(create("cdpruner", parity="official")(aligned, 8).kept_indices[0].tolist())
    assert create("cdpruner", theta=0.0)(tokens, 6).kept_indices[0].tolist() == best_volume(tokens.features[0], 6)


def test_cdpruner_compares_projected_tokens():
    """By hand; the kernel of 0 and 1 is nearly singular. Official relevance is the negated cosine: 1, 0.97, 0.5, 0."""
    x = torch.tensor([[[-1.0, 0], [-3, 1], [0, 1], [1, 0]]])
    tokens = VisualTokens(x, (1, 1, 4), {"text": torch.tensor([[[1.0, 0]]]), "text_mask": torch.ones(1, 1).bool()})
    assert create("cdpruner", parity="official")(tokens, 2).kept_indices.tolist() == [[0, 2]]
    assert create("cdpruner")(tokens, 2).kept_indices.tolist() == [[2, 3]]


def test_official_cdpruner_is_the_greedy_determinant_of_its_kernel(made):
    tokens = made(create("cdpruner"), grid=(1, 3, 4))
    got = create("cdpruner", parity="official")(tokens, 5).kept_indices.tolist()
    for image in range(3):
        words = tokens.signals["text"][image][tokens.signals["text_mask"][image]]
        x = tokens.features[image].double()
        unit = x / x.norm(dim=-1, keepdim=True)
        cosines = torch.stack([-(unit @ (w.double() / w.double().norm())) for w in words]).mean(0)
        relevance = (cosines - cosines.min() + 1e-6) / (cosines.max() - cosines.min())
        kernel, chosen = relevance[:, None] * (unit @ unit.T) * relevance, []
        for _ in range(5):
            value = {n: kernel[[*chosen, n]][:, [*chosen, n]].det().item() for n in range(12) if n not in chosen}
            chosen.append(max(value, key=value.get))
        assert got[image] == sorted(chosen)


def best_volume(x: torch.Tensor, k: int) -> list[int]:
    """Greedy volume of unit vectors, by determinants."""
    unit, chosen = torch.nn.functional.normalize(x.double(), dim=-1), []
    for _ in range(k):
        free = [n for n in range(len(x)) if n not in chosen]
        gram = {n: unit[[*chosen, n]] @ unit[[*chosen, n]].T for n in free}
        chosen.append(max(free, key=lambda n: round(float(gram[n].det()), 12)))
    return sorted(chosen)


def test_mmtok_without_the_picture_covers_the_words_alone(made):
    tokens = made(create("mmtok"), batch=1)
    tokens.features[0, [4, 17]] = torch.eye(6)[:2]
    tokens.signals["text"][0] = torch.eye(6)[[0, 1, 1, 0, 0]]
    tokens.signals["text_mask"][0] = True
    assert create("mmtok", alpha=0.0)(tokens, 2).kept_indices[0].tolist() == [4, 17]


def test_catp_weighs_words_against_cover(made):
    tokens = made(create("catp"), batch=1)
    order = descending(create("catp", relevance=1e6)(tokens, 5).scores[0].tolist())
    assert create("catp", relevance=1e6)(tokens, 5).kept_indices[0].tolist() == sorted(order[:5])


def test_efficientvla_splits_key_task_and_difference(made):
    reducer = create("efficientvla")
    tokens = made(reducer)
    got = reducer(tokens, 11).kept_indices.tolist()
    for image in range(3):
        rows = tokens.signals["text_rows"][image][tokens.signals["text_mask"][image]]
        order, x = descending(rows.double().sum(0).tolist()), tokens.features[image].tolist()
        closest = {n: max(cosine_of(x[n], x[key]) for key in order[:4]) for n in order[7:]}
        assert got[image] == sorted([*order[:7], *sorted(closest, key=closest.get)[:4]])


def test_choices_are_refused_by_name():
    with pytest.raises(UserError, match="hiprune: parity=code: use paper, official"):
        create("hiprune", parity="code")
