"""Makes pocket from nothing: ``python -m lit_reduce.pocket.recipe``; killed, it goes on when started again.

1. ``windows``: the tower learns what patches show, on 6 x 6-patch windows and, every fourth step, on whole pictures.
   Centres lie near the middle of a patch at first, then anywhere.
2. ``language``: the decoder learns to answer and to compare, on symbolic scenes of growing size. Independent of 1.
3. ``pictures``: the tower moves on to whole pictures alone.
4. ``translate``: the projector learns to say in the decoder's words what the tower sees.
5. ``connect``: everything learns to answer together, easy-VQA included; from ``whole_from`` on with all 576 tokens in
   view, but for every third step: a model to reduce tokens of should not be thrown by missing ones.
6. ``polish``: the same on new scenes, more at a time, at a rate that starts anew, and counting, which lags behind,
   weighs double; the stage to run again from an export.
7. ``export``: plain Hugging Face files.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.console import run
from lit_reduce.errors import UserError
from lit_reduce.pocket.comparing import Distances, comparing
from lit_reduce.pocket.connect import connect_loss, picture_loss, question_batch
from lit_reduce.pocket.export import export, start_from
from lit_reduce.pocket.language import symbolic_batch, symbolic_loss
from lit_reduce.pocket.loop import Losses, fit
from lit_reduce.pocket.model import build_model
from lit_reduce.pocket.symbols import Symbols
from lit_reduce.pocket.tower import Heads, picture_batch, validate, whiten, window_batch, window_loss
from lit_reduce.pocket.translate import fold, token_batch, translation_loss, wear
from lit_reduce.pocket.world import JITTER
from lit_reduce.settings import configs_dir, resolve

NEAR, WIDENING = 1.5, 600  # pixels and steps, see `glimpse`
STAGES = ("windows", "language", "pictures", "translate", "connect", "polish", "export")


@dataclass
class RecipeSettings:
    """Settings of the recipe; configs/pocket.yaml explains each."""

    output: str = "outputs/pocket"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    seed: int = 0
    start: str | None = None
    device: str = "auto"
    workers: int = 1
    windows_steps: int = 12000
    windows_still: int = 4000
    windows_rate: float = 2e-3
    language_steps: int = 2000
    language_rate: float = 1e-3
    pictures_steps: int = 600
    pictures_rate: float = 1e-3
    translate_steps: int = 8000
    translate_rate: float = 3e-3
    translate_pictures: int = 2400
    connect_steps: int = 1800
    whole_from: int = 600
    connect_rate: float = 7e-4
    polish_steps: int = 500
    polish_scenes: int = 32
    polish_rate: float = 5e-4
    polish_counted: float = 2.0


def lesson(step: int, eased: bool) -> dict[str, Tensor]:
    """The curriculum of stage 2: when ``eased`` one family on 3 things, then three on 5; then all on whole scenes."""
    if eased and step < 300:
        return symbolic_batch(step, scenes=16, families=1, things=3, seen=12, turns=6)
    if eased and step < 900:
        return symbolic_batch(step, scenes=16, families=3, things=5, seen=20, turns=8)
    return symbolic_batch(step, scenes=16, seen=64, turns=14)


def glimpse(step: int, still: int) -> dict[str, Tensor]:
    """The pictures of stage 1: three batches of windows, then one of whole pictures.

    Centres lie within NEAR pixels of the middle of a patch for ``still`` steps, and within WIDENING more anywhere.
    """
    jitter = NEAR + (JITTER - NEAR) * min(1.0, max(0.0, (step - still) / WIDENING))
    return picture_batch(step, scenes=4, jitter=jitter) if step % 4 == 3 else window_batch(step, jitter=jitter)


def glimpse_loss(model: Any, heads: Heads, device: torch.device) -> Callable[[Any, int], Losses]:
    """Returns the loss of a batch of ``glimpse``; whole pictures are logged under names of their own."""
    windows, pictures = window_loss(model, heads, device), picture_loss(model, heads, device)

    def loss_of(batch: dict[str, Tensor], step: int) -> Losses:
        if "pictures" not in batch:
            return windows(batch, step)
        losses = pictures(batch, step)
        return {"loss": losses["loss"], **{f"pictures_{key}": value for key, value in losses.items()}}

    return loss_of


def make(chosen: RecipeSettings) -> None:
    """Runs the chosen stages, each from where it was.

    Raises:
        UserError: An unknown stage, or one whose predecessor has not been run.
    """
    if wrong := [s for s in chosen.stages if s not in STAGES]:
        raise UserError(f"stages={wrong}: use {', '.join(STAGES)}")
    keep_memory()
    folder = Path(chosen.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if chosen.device == "auto"
        else torch.device(chosen.device)
    )
    model = build_model(chosen.seed).to(device)
    heads = Heads(model.config.vision_config.hidden_size).to(device)
    symbols = Symbols(model.get_input_embeddings()).to(device)
    distances = Distances(model.config.text_config.hidden_size).to(device)
    extra = {"heads": heads, "symbols": symbols, "distances": distances}
    if chosen.start is not None:
        start_from(Path(chosen.start), model, extra)
    tower, llm, projector = model.model.vision_tower, model.model.language_model, wear(model).to(device)
    sees = {"tower": tower, "heads": heads}
    speaks = {"llm": llm, "symbols": symbols, "distances": distances}
    says: dict[str, nn.Module] = {"projector": projector}
    everything = sees | speaks | says
    go: Callable[..., None] = partial(fit, folder=folder, device=device, workers=chosen.workers)
    watch = partial(_watch, model, heads, device)
    go_on = partial(_continue, folder, chosen.start is not None)

    def answering(counted: float) -> Any:
        return comparing(model, distances, connect_loss(model, heads, symbols, device, easy=1, counted=counted))

    if "windows" in chosen.stages:
        if chosen.start is None:
            whiten(model)
        still = chosen.windows_still if chosen.start is None else 0
        go("windows", sees, partial(glimpse, still=still), glimpse_loss(model, heads, device),
           steps=chosen.windows_steps, lr=chosen.windows_rate, on_log=watch)  # fmt: skip
    if "language" in chosen.stages:
        go("language", speaks, partial(lesson, eased=chosen.start is None),
           comparing(model, distances, symbolic_loss(model, symbols, device)), steps=chosen.language_steps,
           lr=chosen.language_rate, warmup=50)  # fmt: skip
    if "pictures" in chosen.stages:
        go_on("windows", sees)
        go("pictures", sees, partial(picture_batch, scenes=8), picture_loss(model, heads, device),
           steps=chosen.pictures_steps, lr=chosen.pictures_rate, on_log=watch)  # fmt: skip
    if "translate" in chosen.stages:
        go_on("pictures", sees)
        go_on("language", speaks)
        pictures = chosen.translate_pictures
        go("translate", says, partial(token_batch, pictures=pictures),
           translation_loss(model, symbols, device, pictures), steps=chosen.translate_steps,
           lr=chosen.translate_rate, log_every=250)  # fmt: skip
    if "connect" in chosen.stages:
        go_on("language", speaks)
        go_on("pictures", sees)
        go_on("translate", says)
        go("connect", everything, partial(lecture, whole_from=chosen.whole_from), answering(1.0),
           steps=chosen.connect_steps, lr=chosen.connect_rate)  # fmt: skip
    if "polish" in chosen.stages:
        go_on("connect", everything)
        go("polish", everything, partial(encore, first=chosen.connect_steps, scenes=chosen.polish_scenes),
           answering(chosen.polish_counted), steps=chosen.polish_steps, lr=chosen.polish_rate)  # fmt: skip
    if "export" in chosen.stages:
        go_on("polish" if (folder / "polish.pt").is_file() else "connect", everything)
        fold(model)
        export(model, extra, folder / "pocket")


def lecture(step: int, whole_from: int, scenes: int = 6) -> dict[str, Tensor]:
    """The pictures of stage 5: parts of them until ``whole_from``; then all 576 tokens in two of three steps."""
    whole = step >= whole_from and step % 3 > 0
    return question_batch(step, scenes=scenes, easy=1, **({"shown": None} if whole else {}))


def encore(step: int, first: int, scenes: int) -> dict[str, Tensor]:
    """The pictures of stage 6: scenes that come after those of the ``first`` steps of stage 5, mostly whole."""
    return lecture(first + step, whole_from=first, scenes=scenes)


def _watch(model: Any, heads: Heads, device: torch.device, _: int) -> dict[str, float]:
    return validate(model, heads, device, 32)


def _continue(folder: Path, optional: bool, stage: str, parts: dict[str, nn.Module]) -> None:
    path = folder / f"{stage}.pt"
    if not path.is_file() and optional:
        return
    if not path.is_file():
        raise UserError(f"{path} is missing: run the stage {stage} first")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["parts"]
    for key, part in parts.items():
        part.load_state_dict(state[key])


def keep_memory() -> None:
    """Tells glibc to reuse freed memory: each training step frees and takes large blocks, and page faults cost more."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # not glibc


def main(argv: Sequence[str]) -> None:
    """Resolves the settings and runs the recipe."""
    make(resolve(RecipeSettings, argv, configs_dir(), "pocket"))


if __name__ == "__main__":
    sys.exit(run(main))
