"""Settings of ``bench``."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option
from lit_reduce.settings.evaluate import CLOCK, CLOCKS, KEEP
from lit_reduce.settings.groups import BackboneSettings, ReducerSettings, backbone, preset, reducer


@dataclass
class BenchSettings:
    """Count and time what a reducer saves and costs.

    lit-reduce bench backbone=shape:smolvlm-256m reducer=covipal keep=[192,128,64] batch=[1,4] out=bench.json
    """

    backbone: BackboneSettings = backbone("shape:smolvlm-256m")
    reducer: ReducerSettings = reducer("covipal", "what is timed; one that needs training gets random weights")
    preset: str = preset()
    keep: Any = option([192, 128, 64], KEEP, min_items=1)
    batch: Any = option([1, 4], "prompts at a time, one number or a list", min=1, min_items=1)
    visual: int | None = option(
        None, "visual tokens of a prompt, free for shape: backbones only (null: 576); else the processor decides", min=1
    )
    text: int = option(32, "text tokens of a prompt; words, where a processor puts its template around them", min=1)
    new_tokens: int = option(17, "answer tokens; all but the first are the decode time", min=1)
    runs: int = option(5, "counted runs of every budget and of the plain backbone, in turns", min=1)
    tower: bool = option(
        True, "whether the vision tower runs each time; false: pictures are encoded before the clock starts"
    )
    clock: str = option("wall", CLOCK, choices=CLOCKS)
    out: str = option("outputs/bench.json", "the report; the settings are written beside it")
