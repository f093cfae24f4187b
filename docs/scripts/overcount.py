"""Counts answers that are too high and too low, with all tokens and with 64 tokens of covipal.

``python docs/scripts/overcount.py`` asks validation questions. covipal runs twice: with its summary tokens, and with
more kept tokens in their place.
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_reduce.backbones import load_backbone
from lit_reduce.inference.spec import ReducerSpec, generate
from lit_reduce.plugin import load_plugin
from lit_reduce.reducer import create
from lit_reduce_pocket.data import scene_rows

KEEP, QUESTIONS, BATCH = 64, 160, 16


def main() -> None:
    """Prints right answers and misses of each way."""
    backbone = load_backbone("pocket")
    covipal, _ = load_plugin(Path(__file__).parents[2] / "checkpoints" / "pocket" / "covipal")
    chosen = create("covipal", **vars(covipal.config) | {"summary": 0})
    chosen.load_state_dict({name: x for name, x in covipal.state_dict().items() if name != "rest"})
    plans = {
        "all tokens": ReducerSpec(),
        "covipal without": ReducerSpec(chosen.eval(), KEEP),
        "covipal": ReducerSpec(covipal, KEEP),
    }
    rows = list(islice((row for row in scene_rows("val", 100 * QUESTIONS) if row.family == "count"), QUESTIONS))
    misses: dict[str, list[int]] = {name: [] for name in plans}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        inputs = backbone.prepare([row.open() for row in part], [row.prompt for row in part])
        for name, plan in plans.items():
            answers, _ = generate(backbone, inputs, plan, 4)
            misses[name] += [int(x) - int(str(row.answer)) for x, row in zip(answers, part, strict=True) if x.isdigit()]
    print(f"{len(rows)} counting questions, {KEEP} of 576 tokens")
    for name, found in misses.items():
        print(f"{name:16} right {found.count(0):4}  too high {sum(x > 0 for x in found):3}", end="")
        print(f"  too low {sum(x < 0 for x in found):3}")


if __name__ == "__main__":
    main()
