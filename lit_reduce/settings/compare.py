"""Settings of ``compare``."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option
from lit_reduce.settings.evaluate import KEEP, ScoreSettings


@dataclass
class CompareSettings(ScoreSettings):
    """Score reducers side by side, in one page with pictures of what each kept.

    lit-reduce compare data=questions.jsonl keep=[192,128,64,32] reducers=[all,outputs/train/plugin]

    A killed run continues when it is started again with the same settings; with others it starts anew.
    """

    reducers: list[Any] = option(
        ["all"],
        "what is compared: names that lit-reduce list shows, folders or hub ids of plug-ins, all (every reducer that "
        "needs no training), or {name: random, options: {seed: 1}}; all tokens are always in the report",
        min_items=1,
    )
    keep: Any = option([192, 128, 64, 32], KEEP, min_items=1)
    out: str = option(
        "outputs/compare.html",
        "the page; beside it the same name with .json, .md (table), .png (plot), .rows.jsonl (answers), .settings.yaml",
    )
    pictures: int = option(4, "questions in the page with what each reducer kept, the families in turn", min=0)
    pictures_keep: Any = option(None, "the budget at which they are shown; null: the one in the middle")
