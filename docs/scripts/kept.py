"""Makes docs/results/kept.png, what the plug-in keeps of test scenes: ``python docs/scripts/kept.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from PIL import Image, ImageDraw

from lit_reduce.backbones import load_backbone
from lit_reduce.inference.spec import ReducerSpec, generate
from lit_reduce.plugin import load_plugin
from lit_reduce.report.overlay import paint
from lit_reduce.runtime import encode, reduce_images, shorten
from lit_reduce_pocket.data import scene_rows

KEEP, WIDE, CAPTION = 32, 330, 34


def main() -> None:
    """Draws the first rightly answered questions of four families."""
    backbone = load_backbone("pocket")
    reducer, _ = load_plugin(Path(__file__).parents[2] / "checkpoints" / "pocket" / "covipal")
    panels: dict[str, Image.Image] = {}
    for row in scene_rows("test", 160):
        picture = row.open()
        if row.family in panels or row.family not in ("number", "word", "chart", "count"):
            continue
        inputs = backbone.prepare([picture], [row.prompt])
        encoded = encode(backbone.model, inputs, reducer.signals, backbone.family)
        _, prompt_map = shorten(backbone.model, inputs, encoded, reduce_images(encoded, reducer, KEEP))
        (answer,), _ = generate(backbone, inputs, ReducerSpec(reducer, KEEP), 16)
        if answer != row.answer:
            continue
        panel = Image.new("RGB", (WIDE, WIDE + CAPTION), "white")
        painted = paint(picture, prompt_map.grids[0], prompt_map.kept_indices[0].tolist())
        panel.paste(painted.resize((WIDE, WIDE)), (0, CAPTION))
        ImageDraw.Draw(panel).text((2, 4), f"{row.prompt}\n{answer}   ({KEEP} of 576 tokens)", fill="black")
        panels[str(row.family)] = panel
    wide = Image.new("RGB", (len(panels) * (WIDE + 8) - 8, WIDE + CAPTION), "white")
    for i, panel in enumerate(panels.values()):
        wide.paste(panel, (i * (WIDE + 8), 0))
    wide.save(Path(__file__).parents[1] / "results" / "kept.png")


if __name__ == "__main__":
    main()
