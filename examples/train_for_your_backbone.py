"""Train a reducer for a backbone of your own, export it as a plug-in and attach it.

Run ``python examples/train_for_your_backbone.py`` for a tiny random LLaVA, offline, in seconds, or
``python examples/train_for_your_backbone.py llava-hf/llava-1.5-7b-hf rows.jsonl``.

Each line of rows.jsonl is ``{"image": "a.png", "prompt": "What is on the left?"}``; an ``answer`` is optional, in
training the model's own answer takes its place.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny_llava
from PIL import Image

from lit_reduce import attach, load_backbone
from lit_reduce.cli import main as lit_reduce

# For a demonstration of seconds: a few steps, small budgets, no table. Leave these out for a real backbone.
QUICK = [
    "steps=6", "guide_steps=3", "warmup=2", "pictures=2", "turns=2", "val_every=3", "budgets=[4,12]", "val_budgets=[6]",
    "table_budgets=[]", "data.cache=null", "accelerator=cpu", "precision=32-true",
]  # fmt: skip


def save_tiny(folder: Path) -> Path:
    """A folder with the files of the tiny LLaVA, as ``save_pretrained`` writes them."""
    tiny_llava.model().save_pretrained(folder)
    tiny_llava.processor().save_pretrained(folder)
    return folder


def write_rows(folder: Path, images: int = 24) -> Path:
    """A JSON-lines file with two questions about each of some images of two colours."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(images):
        image = Image.new("RGB", (24, 24), (10 * number, 200, 50))
        image.paste((255, 255 - 9 * number, 0), (12, 0, 24, 24))
        image.save(folder / f"{number}.png")
        rows += [{"image": f"{number}.png", "prompt": f"what is on the {side} ?"} for side in ("left", "right")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(backbone: str | Path, rows: str | Path, output: Path, *settings: str) -> Path:
    """Train and export; returns the folder of the plug-in.

    Raises:
        RuntimeError: the command refused its settings; it has printed why.
    """
    words = [f"backbone={backbone}", f"data.name={rows}", f"output={output}", *settings]
    if lit_reduce(["train", *words]):
        raise RuntimeError("training did not start; the line above says why")
    return output / "plugin"


def ask(backbone: str | Path, plugin: Path, keep: int) -> str:
    """One answer of the backbone with the plug-in attached."""
    loaded = load_backbone(str(backbone))
    inputs = loaded.prepare([Image.new("RGB", (48, 48), "red")], ["what is on the left ?"])
    with attach(loaded.model, plugin, keep=keep):
        sequences = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return loaded.decode(sequences, inputs)[0]


def main(words: list[str]) -> None:
    """Train covipal for the backbone that is named, or for the tiny one."""
    if len(words) == 2:
        plugin = train(words[0], words[1], Path("outputs/mine"))
        print("answer:", ask(words[0], plugin, keep=64))
        return
    with TemporaryDirectory() as place:
        folder = save_tiny(Path(place) / "backbone")
        size = ["reducer.options.width=16", "reducer.options.heads=2", "reducer.options.layers=1"]
        plugin = train(folder, write_rows(Path(place) / "data"), Path(place) / "out", *QUICK, *size)
        print("plug-in:", sorted(path.name for path in plugin.iterdir()))
        print("answer:", ask(folder, plugin, keep=6))


if __name__ == "__main__":
    main(sys.argv[1:])
