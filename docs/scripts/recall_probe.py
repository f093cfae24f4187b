"""Measures how well a linear map of the projected tokens predicts the decoder's own keys and values.

``python docs/scripts/recall_probe.py [pictures to fit on, pictures held out]`` prints the held-out R^2 of the best map
by decoder layer and rank, and writes it to outputs/recall_probe.json. An ``own`` map has its rank for the keys or
values of one layer. A ``shared`` map goes through a single trunk of that rank for all layers but the first, keys and
values together, as in FlexAttention's reducer.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lit_reduce.backbones import load_backbone
from lit_reduce.distill.kv_regression import keys_and_values, moments
from lit_reduce.distill.teacher import Teacher
from lit_reduce.files import write_atomic
from lit_reduce.ops.regression import explained, fit
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce_pocket.data import scene_groups

RANKS: list[int | None] = [16, 32, 64, None]
OUT = Path("outputs/recall_probe.json")


def main() -> None:
    """Fits on training scenes, scores on validation scenes."""
    train, held = [int(n) for n in sys.argv[1:]] or (32, 16)
    backbone = load_backbone("pocket")
    model, teacher = backbone.model, Teacher(backbone, [0])
    layers = list(range(len(model.get_decoder().layers)))
    seen = moments(model, map(teacher.outputs, scene_groups("train", train, 1)), layers)
    x, y = [], []
    for outputs in map(teacher.outputs, scene_groups("val", held, 1)):
        features = outputs["features"].float()
        x.append(rms_normalize(features).double())
        y.append(keys_and_values(model, outputs["prefix"], features, layers).double())
    inputs, targets = torch.cat(x), torch.cat(y)
    width, rows = targets.shape[2], []
    weight = (1 / seen.spread.view(-1, width).mean(1)).repeat_interleave(width)
    for rank in RANKS:
        late = slice(2 * width, None)
        together = fit(seen.columns(late), rank, weight=weight[late])(inputs).view(len(inputs), -1, width)
        for number in range(2 * len(layers)):
            own = fit(seen.columns(slice(number * width, (number + 1) * width)), rank)(inputs)
            row = {"layer": number // 2, "what": "values" if number % 2 else "keys", "rank": rank}
            row["own"] = explained(own, targets[:, number])
            row["shared"] = explained(together[:, number - 2], targets[:, number]) if number > 1 else None
            rows.append(row)
    report = {"backbone": backbone.identity.id, "hash": backbone.identity.hash, "train": train, "held": held}
    OUT.parent.mkdir(exist_ok=True)
    write_atomic(OUT, json.dumps({**report, "rows": rows}, indent=1) + "\n")
    ranks = [str(rank or "full") for rank in RANKS]
    print(f"R^2 on {held} held-out pictures, fitted on {train}; {backbone.identity.id} {backbone.identity.hash[:12]}")
    print("| layer | of | " + " | ".join([*(f"own {r}" for r in ranks), *(f"shared {r}" for r in ranks)]) + " |")
    print("|---|---|" + "---|" * 2 * len(ranks))
    for number in range(2 * len(layers)):
        mine = [row for row in rows if (row["layer"], row["what"] == "values") == (number // 2, number % 2 == 1)]
        cells = [row[kind] for kind in ("own", "shared") for row in mine]
        shown = " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells)
        print(f"| {number // 2} | {mine[0]['what']} | {shown} |")
    print(f"report: {OUT}")


if __name__ == "__main__":
    main()
