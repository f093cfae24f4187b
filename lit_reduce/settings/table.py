"""Settings of ``table``."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option
from lit_reduce.settings.evaluate import CLOCK, CLOCKS, DATA, KEEP, ScoreSettings
from lit_reduce.settings.groups import AUTO


@dataclass
class TableSettings(ScoreSettings):
    """Score, count and time the plug-ins of a backbone and the baselines at every budget.

    lit-reduce table

    Answers are kept: a killed run continues, and a further plug-in costs only its own questions. Times are measured
    anew in each run.
    """

    keep: Any = option([192, 128, 64, 32], KEEP + "; inside the language model the mean over layers", min_items=1)
    data: str | None = option(AUTO, DATA + "; auto: the default one")
    out: str = option(
        "outputs/table.json",
        "the table; beside it the same name with .md, .png (plot), .settings.yaml",
    )
    limit: int | None = option(2000, "questions; null for all of a file", min=1)
    plugins: str = option(
        AUTO,
        "folder of the plug-ins: METHOD, and METHOD-seed1, METHOD-seed2, ... for further seeds; auto: those of the "
        "reference model",
    )
    methods: list[str] = option(
        ["covipal", "packer", "atp", "falcon", "mod", "voco", "flexattention", "remember"],
        "plug-ins in the table; one that is missing is shown as missing",
    )
    baselines: list[Any] = option(
        ["random", "pool", "fastervlm", "mmtok", "cdpruner", "divprune", "fastv", "pyramiddrop"],
        "lines below them: reducers that need no training, as in compare",
        was="yardsticks",
    )
    answers: str = option("outputs/table", "folder of the answers; remove it after a change of a reducer's code")
    clock: str = option("wall", CLOCK, choices=CLOCKS)
