"""Settings of ``evaluate``, and what it has in common with ``compare`` and ``table``."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option
from lit_reduce.settings.groups import AUTO, BackboneSettings, ReducerSettings, backbone, reducer

CLOCKS = ("wall", "cpu")
KEEP = "budgets: counts (64) or ratios (0.25) of each picture's tokens, one or a list"
DATA = (
    "the questions: a JSON-lines file with image, prompt, answer (a text, or a list of accepted texts) and optional "
    "family in each line, or the name of a reference model's question set"
)
CLOCK = "wall: elapsed time; cpu: processor time of this process, for a machine that others use too (with one thread)"


@dataclass
class ScoreSettings:
    """What ``evaluate``, ``compare`` and ``table`` have in common."""

    backbone: BackboneSettings = backbone()
    keep: Any = option(64, KEEP)
    data: str | None = option(None, DATA)
    out: str = option("outputs/report.json", "the report")
    limit: int | None = option(None, "rows from the start of the data; null: all of a file, 500 of a named set", min=1)
    max_new_tokens: int = option(32, "the longest answer, in tokens", min=1)
    batch_size: int = option(16, "questions at a time", min=1)
    runs: int = option(5, "timed runs to the first token of one question, in turns; 0: no timing", min=0)


@dataclass
class EvaluateSettings(ScoreSettings):
    """Score one reducer on questions with answers; ``lit-reduce compare`` sets several side by side.

    lit-reduce evaluate data=questions.jsonl reducer=outputs/train/plugin keep=[64,32] out=report.json

    A killed run continues when it is started again with the same settings; with others it starts anew.
    """

    reducer: ReducerSettings = reducer(AUTO, "what is scored; auto: the plug-in of the reference model")
    keep: Any = option([64, 32], KEEP, min_items=1)
    out: str = option(
        "outputs/report.json",
        "the report; beside it the same name with .md (table), .png (plot), .rows.jsonl (answers), .settings.yaml",
    )
