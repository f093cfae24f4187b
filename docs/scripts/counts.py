"""Do harder questions keep more? ``python docs/scripts/counts.py [questions] [budget] [plug-in]`` asks atp.

Prints, on test questions of pocket that it answers with all tokens, how many tokens each decoder layer works on (mean
and standard deviation over questions), and the mean over layers by kind of question and by difficulty. A question is
hard when CDPruner, which knows nothing of the plug-in, gets it wrong with 32 tokens. Written to outputs/counts.json.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tqdm import tqdm

from lit_reduce.backbones import load_backbone
from lit_reduce.evaluate.bootstrap import interval
from lit_reduce.evaluate.metrics import is_correct
from lit_reduce.files import write_atomic
from lit_reduce.inference.spec import ReducerSpec, generate
from lit_reduce.plugin import load_plugin
from lit_reduce.reducer import create
from lit_reduce.runtime import attach
from lit_reduce_pocket.data import scene_rows

OUT, HARD = Path("outputs/counts.json"), 32


@torch.inference_mode()
def main() -> None:
    """Asks one question at a time, so that every layer's count is that question's own."""
    count, keep = int(sys.argv[1]) if sys.argv[1:] else 400, int(sys.argv[2]) if sys.argv[2:] else 64
    folder = Path(sys.argv[3]) if sys.argv[3:] else Path(__file__).parents[2] / "checkpoints" / "pocket" / "atp"
    backbone, (reducer, _) = load_backbone("pocket"), load_plugin(folder)
    judge, rows = ReducerSpec(create("cdpruner"), HARD), []
    for row in tqdm(scene_rows("test", count), total=count, unit="question"):
        inputs = backbone.prepare([row.open()], [row.prompt])
        right = [is_correct(generate(backbone, inputs, plan, 32)[0][0], row.answer) for plan in (ReducerSpec(), judge)]
        if right[0]:
            with attach(backbone.model, reducer, keep=keep) as attached:
                backbone.model.generate(**inputs, do_sample=False, max_new_tokens=1)
            rows.append({"family": row.family, "hard": not right[1], "layers": attached.stats.layers})
    OUT.parent.mkdir(exist_ok=True)
    write_atomic(OUT, json.dumps({"keep": keep, "questions": count, "rows": rows}) + "\n")
    layers = list(zip(*(row["layers"] for row in rows), strict=True))
    print(f"{folder.name} at {keep}, {len(rows)} questions: tokens by layer, mean and standard deviation")
    print(", ".join(f"{statistics.mean(layer):.1f} ± {statistics.stdev(layer):.1f}" for layer in layers))
    groups = defaultdict(list)
    for row in rows:
        for name in (row["family"], "hard" if row["hard"] else "easy", "all"):
            groups[name].append(statistics.mean(row["layers"]))
    for name, kept in sorted(groups.items(), key=lambda group: -statistics.mean(group[1])):
        low, high = interval(torch.tensor(kept, dtype=torch.float64))
        print(f"| {name} | {len(kept)} | {statistics.mean(kept):.1f} [{low:.1f}, {high:.1f}] |")


if __name__ == "__main__":
    main()
