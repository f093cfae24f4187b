"""What a report looks like: Markdown, plot, and the files they go to."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_reports import LINES, RESULTS, SEEDS
from PIL import Image

from lit_reduce.evaluate.results import ALL_TOKENS, Results, Score
from lit_reduce.report.markdown import markdown
from lit_reduce.report.plots import frontier, plot, points
from lit_reduce.report.summary import Line, summary
from lit_reduce.report.write import write_report


def tables(text: str) -> list[list[list[str]]]:
    """The cells of all tables, without the rule below the header."""
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block if "---" not in line]
        for block in blocks
        if block
    ]


def test_markdown_has_a_line_a_reducer_and_marks_the_best() -> None:
    text = markdown(summary(RESULTS))
    assert text.startswith("pocket: 4 questions, 100.0 % [100.0, 100.0] right with all 576 visual tokens.\n")
    accuracy, relative, times = tables(text)
    assert accuracy == [
        ["reducer", "keep 64", "keep 0.05"],
        ["all tokens (576)", "100.0", "100.0"],
        ["ours", "**75.0**", "**50.0**"],
        ["grid", "25.0", "**50.0**"],  # a tie: both are best
    ]
    assert relative[0] == ["reducer", "keep 64", "keep 0.05"]
    assert re.fullmatch(r"75\.0 \[\d+\.0, 100\.0\]", relative[1][1])
    assert "standard deviation" not in text
    assert times[1:] == [
        ["all tokens (576)", *["90.0 [80.0, 95.0]"] * 2],
        ["ours", "30.0 [29.0, 33.0], own 1.2", "-"],
        ["grid", "-", "-"],
    ]


def test_its_columns_line_up() -> None:
    for block in markdown(summary(RESULTS)).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({tuple(i for i, mark in enumerate(line) if mark == "|") for line in lines}) <= 1


def test_markdown_of_several_seeds_says_how_they_differ() -> None:
    text = markdown(summary(SEEDS, LINES))
    accuracy, relative, kinds = tables(text)
    assert [row[0] for row in accuracy] == ["reducer", "all tokens (36)", "a", "c", "b"]
    assert accuracy[3] == ["c", "missing"]
    assert relative[1][:3] == ["a", "3", "12 k, 0.1 MB"]
    assert relative[1][3].startswith("100.0 [")
    assert relative[1][3].endswith(" ± 47.1")
    assert relative[3][:3] == ["b", "-", "0"]
    assert kinds[1:3] == [["all tokens", "100.0", "50.0"], ["a", "100.0", "50.0"]]
    assert text.endswith("- a-seed2 failed at 9: torn\n- c failed at 9: no plug-in at c\n")


def test_what_failed_has_a_row_and_a_reason() -> None:
    broken = [Score("bad", 64, error="no signal"), Score("bad", 0.05, error="no signal")]
    text = markdown(summary(replace(RESULTS, scores=[*RESULTS.scores, *broken])))
    assert tables(text)[0][-1] == ["bad", "failed", "failed"]
    assert text.splitlines()[-1] == "- bad failed at 64, 0.05: no signal"


def test_more_reducers_than_colours_share_one(tmp_path: Path) -> None:
    many = [Score(f"r{i}", keep, keep, [1] * (i % 4) + [0] * (4 - i % 4)) for i in range(11) for keep in (9, 16)]
    results = replace(RESULTS, scores=[RESULTS.scores[0], *many])
    plot(summary(results), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<!-- 3 others -->" in text
    assert text.count("<!-- r") == 8
    lines = {f"r{i}": Line([f"r{i}"], facts={"trained": i < 2}) for i in range(11)}
    plot(summary(results, lines), tmp_path / "trained.svg")  # two trained ones in colour, the best eight others in grey
    text = (tmp_path / "trained.svg").read_text()
    assert "<!-- 1 others -->" in text
    assert text.count("<!-- r") == 10


def test_the_frontier() -> None:
    assert frontier([(3, 90), (1, 80), (2, 70), (3, 95), (4, 95)]) == [(1, 80), (3, 95)]
    assert points(summary(RESULTS)) == {"ours": [(30.0, 75.0)]}
    time = {"first_token_ms": {"median": 20.0, "low": 19.0, "high": 22.0}}
    assert points(summary(SEEDS, LINES, costs={("a", 9): time})) == {"a": [(20.0, pytest.approx(100.0))]}


def test_the_plot_shows_times_where_there_are_some() -> None:
    sizes = []
    for results in (RESULTS, SEEDS):
        buffer = io.BytesIO()
        plot(summary(results), buffer)
        with Image.open(buffer) as picture:
            assert picture.format == "PNG"
            sizes.append(picture.width)
    assert sizes[0] > sizes[1]


def test_files(tmp_path: Path) -> None:
    report = summary(RESULTS)
    written = write_report(report, tmp_path / "new" / "report.json")
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(report))
    assert written[1].read_text() == markdown(report)
    with Image.open(written[2]) as picture:
        assert min(picture.size) > 500
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x1F, 0x6F, 0xB4), (0xD9, 0x5F, 0x02)} <= colours  # a line for each reducer
    assert sorted(written) == sorted((tmp_path / "new").iterdir())


def test_all_tokens_alone(tmp_path: Path) -> None:
    alone = summary(Results("pocket", 4, 576, RESULTS.scores[:1]))
    write_report(alone, tmp_path / "report.json")
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert "First token with all tokens, ms: 90.0 [80.0, 95.0]." in (tmp_path / "report.md").read_text()
    assert alone["scores"][0]["reducer"] == ALL_TOKENS
