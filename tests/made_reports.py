"""Results that reports are made of: one seed each, and several seeds of which one failed."""

from lit_reduce.benchmark.latency import Spread, Timing
from lit_reduce.evaluate.results import ALL_TOKENS, Results, Score
from lit_reduce.report.summary import Line

RESULTS = Results(
    backbone="pocket",
    rows=4,
    tokens=576,
    scores=[
        Score(ALL_TOKENS, None, 576.0, [1, 1, 1, 1], timing=Timing(Spread(90.0, 80.0, 95.0), None, 5)),
        Score("ours", 64, 64.0, [1, 1, 1, 0], timing=Timing(Spread(30.0, 29.0, 33.0), Spread(1.25, 1.0, 1.5), 5)),
        Score("ours", 0.05, 29.0, [1, 1, 0, 0]),
        Score("grid", 64, 64.0, [1, 0, 0, 0]),
        Score("grid", 0.05, 29.0, [1, 1, 0, 0]),
    ],
)

SEEDS = Results(
    "tiny",
    4,
    36,
    [
        Score(ALL_TOKENS, None, 36, [1.0, 1.0, 1.0, 0.0]),
        Score("a", 9, 9.0, [1.0, 1.0, 0.0, 0.0]),
        Score("a-seed1", 9, 8.0, [1.0, 1.0, 1.0, 1.0]),
        Score("a-seed2", 9, error="torn"),
        Score("b", 9, 9.0, [0.0, 0.0, 1.0, 0.0]),
    ],
    ["x", "x", "y", "y"],
)

LINES = {
    "b": Line(["b"], facts={"trained": False}),
    "a": Line(["a", "a-seed1", "a-seed2"], facts={"trained": True, "parameters": 12000, "bytes": 50_000}),
    "c": Line([], {"c": "no plug-in at c"}, {"trained": True}),
}
