"""The report: the same numbers in JSON, Markdown, text and the plot."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lit_reduce.report.accuracy import markdown, summary, text_table, write_report
from PIL import Image

from lit_reduce.benchmark.latency import Timing
from lit_reduce.evaluate.evaluator import ALL_TOKENS, Results, Score
from lit_reduce.report.plots import plot

RESULTS = Results(
    backbone="pocket",
    rows=4,
    tokens=576,
    scores=[
        Score(ALL_TOKENS, None, 576.0, [1, 1, 1, 1], timing=Timing(90.0, 80.0, 95.0, None, 5)),
        Score("ours", 64, 64.0, [1, 1, 1, 0], timing=Timing(30.0, 29.0, 33.0, 1.25, 5)),
        Score("ours", 0.05, 29.0, [1, 1, 0, 0]),
        Score("grid", 64, 64.0, [1, 0, 0, 0]),
        Score("grid", 0.05, 29.0, [1, 1, 0, 0]),
    ],
)


def test_summary_holds_what_was_measured() -> None:
    first, second = summary(RESULTS)["scores"][:2]
    assert (first["accuracy"], first["low"], first["high"], first["keep"]) == (1.0, 1.0, 1.0, None)
    assert (second["reducer"], second["keep"], second["kept_tokens"], second["accuracy"]) == ("ours", 64, 64.0, 0.75)
    assert second["low"] < 0.75 <= second["high"]
    assert (second["ttft_ms"], second["reducer_ms"]) == (30.0, 1.25)
    assert "ttft_ms" not in summary(RESULTS)["scores"][2]


def test_markdown_has_a_line_a_reducer_and_marks_the_best() -> None:
    lines = markdown(summary(RESULTS)).splitlines()
    assert lines[0] == "| reducer | keep 64 | keep 0.05 |"
    assert lines[2].startswith("| all tokens (576) | 100.0 [100.0, 100.0] |")
    assert lines[3].startswith("| ours | **75.0 [")
    assert lines[4].startswith("| grid | 25.0 [")
    assert lines[3].count("**50.0 [") == lines[4].count("**50.0 [") == 1  # a tie: both are best
    assert len({line.count("|") for line in lines}) == 1


def test_text_lines_up() -> None:
    lines = text_table(summary(RESULTS)).splitlines()
    assert len(lines) == 2 + 5
    assert len({len(line) for line in lines}) == 1
    assert "1.25" in lines[3]
    assert lines[3].split()[:3] == ["ours", "64", "75.0"]


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


def test_uneven_counts_are_told_by_kind() -> None:
    even, score = Score("even", 9, 9.0, [1] * 4, counts=[9.0] * 4), Score("x", 9, 9.0, [1, 0, 1, 0])
    score.counts = [6.0, 8.0, 12.0, 10.0]
    some = replace(RESULTS, scores=[RESULTS.scores[0], even, score], families=["a", "a", "b", None])
    report = summary(some)
    entry = report["scores"][2]
    assert entry["kept_spread"] == pytest.approx(5**0.5)
    assert entry["kept_families"] == {"a": {"mean": 7.0, "spread": 1.0}, "b": {"mean": 12.0, "spread": 0.0}}
    assert "kept_spread" not in report["scores"][1]
    assert text_table(report).splitlines()[-1] == "x at 9 kept 9.0 ± 2.2 tokens: b 12.0 ± 0.0, a 7.0 ± 1.0"


def test_a_failure_is_told_once_with_its_budgets() -> None:
    broken = [Score("bad", 64, error="no signal"), Score("bad", 0.05, error="no signal")]
    report = summary(replace(RESULTS, scores=[*RESULTS.scores, *broken]))
    assert text_table(report).splitlines()[-1] == "bad failed at 64, 0.05: no signal"
    assert markdown(report).splitlines()[-1] == "| bad | failed | failed |"
    assert markdown(report).splitlines()[:-1] == markdown(summary(RESULTS)).splitlines()


def test_more_reducers_than_colours_share_one(tmp_path: Path) -> None:
    many = [Score(f"r{i}", keep, keep, [1] * (i % 4) + [0] * (4 - i % 4)) for i in range(11) for keep in (9, 16)]
    plot(summary(replace(RESULTS, scores=[RESULTS.scores[0], *many])), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<!-- 3 others -->" in text
    assert text.count("<!-- r") == 8


def test_files(tmp_path: Path) -> None:
    report = write_report(RESULTS, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(json.dumps(report))
    with Image.open(tmp_path / "new" / "report.png") as plot:
        assert min(plot.size) > 500
        colours = {colour for _, colour in plot.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x1F, 0x6F, 0xB4), (0xD9, 0x5F, 0x02)} <= colours  # a line for each reducer
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md", "report.png"]


def test_all_tokens_alone(tmp_path: Path) -> None:
    alone = Results("pocket", 4, 576, RESULTS.scores[:1])
    write_report(alone, tmp_path / "report.json")
    assert (tmp_path / "report.png").stat().st_size > 1000
    with pytest.raises(KeyError):
        alone.score("ours", 64)
