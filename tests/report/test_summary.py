"""The summary: the figures of one seed and of several, and what is known where there are none."""

import statistics
from dataclasses import replace

import pytest
import torch
from made_reports import LINES, RESULTS, SEEDS

from lit_reduce.benchmark.costs import measure_costs
from lit_reduce.evaluate.bootstrap import interval, ratio_interval
from lit_reduce.evaluate.results import ALL_TOKENS, Results, Score
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.reducer import create
from lit_reduce.report.lookup import failures, ranked, uneven_counts
from lit_reduce.report.summary import Line, facts, summary


def test_it_holds_what_was_measured() -> None:
    report = summary(RESULTS)
    first, second, third = report["scores"][:3]
    assert (first["accuracy"], first["low"], first["high"], first["keep"]) == (1.0, 1.0, 1.0, None)
    assert (second["reducer"], second["keep"], second["kept_tokens"], second["accuracy"]) == ("ours", 64, 64.0, 0.75)
    assert (second["low"], second["high"]) == interval(torch.tensor([1, 1, 1, 0]))
    assert second["first_token_ms"] == {"median": 30.0, "low": 29.0, "high": 33.0}
    assert second["reducer_ms"]["median"] == 1.25
    assert "first_token_ms" not in third
    assert "reducer_ms" not in first
    assert report["keeps"] == [64, 0.05]
    assert list(report["reducers"]) == ["ours", "grid"]


def test_relative_to_all_tokens_and_by_kind() -> None:
    half = replace(RESULTS, scores=[Score(ALL_TOKENS, None, 576.0, [1, 1, 0, 1]), Score("x", 9, 9.0, [1, 0, 1, 0])])
    half.families = ["a", "a", "b", None]
    first, second = summary(half)["scores"]
    assert "relative" not in first
    assert second["relative"] == pytest.approx(0.5 / 0.75)
    assert second["relative_low"] < second["relative"] < second["relative_high"]
    assert first["families"] == {"a": 1.0, "b": 0.0}
    assert second["families"] == {"a": 0.5, "b": 1.0}
    assert summary(half)["families"] == {"a": 2, "b": 1}
    nothing = replace(half, scores=[Score(ALL_TOKENS, None, 576.0, [0, 0, 0, 0]), half.scores[1]])
    assert "relative" not in summary(nothing)["scores"][1]


def test_seeds_are_averaged_and_their_spread_is_known() -> None:
    report = summary(SEEDS, LINES)
    found = report["scores"][2]
    assert (found["seeds"], found["kept_tokens"], found["errors"]) == (2, 8.5, {"a-seed2": "torn"})
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["each"] == pytest.approx([2 / 3, 4 / 3])
    assert found["relative"] == pytest.approx(1.0)
    assert found["spread"] == pytest.approx(statistics.stdev([2 / 3, 4 / 3]))
    assert found["families"] == {"x": 1.0, "y": 0.5}
    mean, whole = torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert (found["relative_low"], found["relative_high"]) == ratio_interval(mean, whole)
    assert (found["low"], found["high"]) == interval(mean)
    assert ranked(report) == ["a", "c", "b"]
    assert failures(report) == ["a-seed2 failed at 9: torn", "c failed at 9: no plug-in at c"]


def test_one_seed_is_a_report_of_n_1() -> None:
    alone, several = summary(RESULTS), summary(RESULTS, {name: Line([name]) for name in ("ours", "grid")})
    assert alone == several
    twice = Results("pocket", 4, 576, [*RESULTS.scores, replace(RESULTS.scores[1], reducer="again")])
    one, two = alone["scores"][1], summary(twice, {"ours": Line(["ours", "again"])}, [64])["scores"][1]
    assert {**two, "seeds": 1, "each": two["each"][:1]} == {**one, "spread": 0.0}


def test_uneven_counts_are_told_by_kind() -> None:
    even, score = Score("even", 9, 9.0, [1] * 4, counts=[9.0] * 4), Score("x", 9, 9.0, [1, 0, 1, 0])
    score.counts = [6.0, 8.0, 12.0, 10.0]
    some = replace(RESULTS, scores=[RESULTS.scores[0], even, score], families=["a", "a", "b", None])
    report = summary(some)
    entry = report["scores"][2]
    assert entry["kept_spread"] == pytest.approx(5**0.5)
    assert entry["kept_families"] == {"a": {"mean": 7.0, "spread": 1.0}, "b": {"mean": 12.0, "spread": 0.0}}
    assert "kept_spread" not in report["scores"][1]
    assert uneven_counts(report) == ["x at 9 kept 9.0 ± 2.2 tokens: b 12.0 ± 0.0, a 7.0 ± 1.0"]


def test_a_failure_is_told_once_with_its_budgets() -> None:
    broken = [Score("bad", 64, error="no signal"), Score("bad", 0.05, error="no signal")]
    report = summary(replace(RESULTS, scores=[*RESULTS.scores, *broken]))
    assert failures(report) == ["bad failed at 64, 0.05: no signal"]
    assert report["scores"][-1] == {"reducer": "bad", "keep": 0.05, "error": "no signal"}
    with pytest.raises(KeyError):
        RESULTS.score("ours", 32)


def test_costs_stand_in_the_entries_and_what_cannot_be_priced_says_why(tiny, pictures) -> None:
    broken = create("grid")
    broken.reduce = lambda *_: 1 / 0
    inputs = tiny.prepare(pictures[:1], ["what is red ?"])
    keys = {("ours", 64): ReducerSpec(create("grid"), 9), ("grid", 64): ReducerSpec(broken, 9)}
    turns: list[int] = []
    costs = measure_costs(tiny, inputs, {(ALL_TOKENS, None): ReducerSpec()} | keys, 2, on_run=lambda: turns.append(1))
    assert len(turns) == 2 * 2
    whole, ours, _, grid = summary(RESULTS, costs=costs)["scores"][:4]
    assert ours["flops"]["prefill"] < whole["flops"]["prefill"]
    assert ours["first_token_ms"]["median"] > ours["prefill_ms"]["median"] > 0
    assert grid["cost_error"].startswith("ZeroDivisionError")
    assert failures(summary(RESULTS, costs=costs)) == [f"grid at 64 was not timed: {grid['cost_error']}"]


def test_facts() -> None:
    assert facts(ReducerSpec()) == {}
    found = facts(ReducerSpec(create("fastervlm")))
    assert (found["signals"], found["trained"], found["parameters"]) == (["cls"], False, 0)
