"""Makes pocket from nothing: ``python -m lit_reduce_pocket.recipe``; killed, it goes on when started again.

1. ``windows``: the tower learns what patches show, on 6 x 6-patch windows.
2. ``language``: the decoder learns to answer and to compare, on symbolic scenes of growing size. Independent of 1.
3. ``pictures``: the tower moves on to whole pictures.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.console import run
from lit_reduce.errors import UserError
from lit_reduce.options import option
from lit_reduce.settings import check, configs_dir, resolve
from lit_reduce_pocket.comparing import Distances, comparing
from lit_reduce_pocket.connect import connect_loss, picture_loss, question_batch
from lit_reduce_pocket.export import export, start_from
from lit_reduce_pocket.language import symbolic_batch, symbolic_loss
from lit_reduce_pocket.loop import fit
from lit_reduce_pocket.model import build_model
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.tower import Heads, picture_batch, validate, whiten, window_batch, window_loss
from lit_reduce_pocket.translate import fold, token_batch, translation_loss, wear

STAGES = ("windows", "language", "pictures", "translate", "connect", "polish", "export")


@dataclass
class RecipeSettings:
    """Make the reference backbone from nothing.

    python -m lit_reduce_pocket.recipe

    A killed run continues when it is started again. Stages 1 and 2 are independent and may run side by side.
    """

    output: str = option("outputs/pocket", "checkpoints and logs of the stages; the model goes to output/pocket")
    stages: list[str] = option(list(STAGES), "which stages run, in this order", choices=STAGES)
    seed: int = option(0, "seed of the weights; scenes have seeds of their own", min=0)
    init_from: str | None = option(None, "an exported pocket to train on from, instead of new weights", was="start")
    device: str = option("auto", "cpu, cuda, ...; auto takes the GPU where there is one")
    workers: int = option(1, "processes that draw scenes", min=0)
    windows_steps: int = option(6000, "steps of stage 1, each 64 windows of 6 x 6 patches", min=1)
    windows_rate: float = option(2e-3, "its peak learning rate (Muon for matrices in blocks, else AdamW)", above=0)
    language_steps: int = option(2000, "steps of stage 2, each 16 symbolic scenes, up to 14 questions", min=1)
    language_rate: float = option(1e-3, "its peak learning rate", above=0)
    pictures_steps: int = option(300, "steps of stage 3, each 8 whole pictures", min=1)
    pictures_rate: float = option(1e-3, "its peak learning rate", above=0)
    translate_steps: int = option(8000, "steps of stage 4, each 2048 tokens", min=1)
    translate_rate: float = option(3e-3, "its peak learning rate (AdamW)", above=0)
    translate_pictures: int = option(2400, "training pictures whose tokens it uses, a multiple of 16", min=16)
    connect_steps: int = option(1800, "steps of stage 5, each 6 scenes, an easy-VQA picture, up to 20 questions", min=1)
    whole_from: int = option(
        600, "from this step of stage 5 on two of three steps see all 576 tokens; before: 208", min=0
    )
    connect_rate: float = option(7e-4, "its peak learning rate", above=0)
    polish_steps: int = option(500, "steps of stage 6, as the last ones of stage 5", min=1)
    polish_scenes: int = option(32, "scenes in each of them, beside the easy-VQA picture", min=1)
    polish_rate: float = option(5e-4, "its peak learning rate", above=0)
    polish_counted: float = option(2.0, "weight of answers to counting questions; 1: that of all others", min=0)


def lesson(step: int, eased: bool) -> dict[str, Tensor]:
    """The curriculum of stage 2: when ``eased`` one family on 3 things, then three on 5; then all on whole scenes."""
    if eased and step < 300:
        return symbolic_batch(step, scenes=16, families=1, things=3, seen=12, turns=6)
    if eased and step < 900:
        return symbolic_batch(step, scenes=16, families=3, things=5, seen=20, turns=8)
    return symbolic_batch(step, scenes=16, seen=64, turns=14)


def make(settings: RecipeSettings) -> None:
    """Runs the stages that the settings name, each from where it was.

    Raises:
        UserError: An unknown stage, or one whose predecessor has not been run.
    """
    check(settings)
    keep_memory()
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device == "auto"
        else torch.device(settings.device)
    )
    model = build_model(settings.seed).to(device)
    heads = Heads(model.config.vision_config.hidden_size).to(device)
    symbols = Symbols(model.get_input_embeddings()).to(device)
    distances = Distances(model.config.text_config.hidden_size).to(device)
    extra = {"heads": heads, "symbols": symbols, "distances": distances}
    if settings.init_from is not None:
        start_from(Path(settings.init_from), model, extra)
    tower, llm, projector = model.model.vision_tower, model.model.language_model, wear(model).to(device)
    sees = {"tower": tower, "heads": heads}
    speaks = {"llm": llm, "symbols": symbols, "distances": distances}
    says: dict[str, nn.Module] = {"projector": projector}
    everything = sees | speaks | says
    go: Callable[..., None] = partial(fit, folder=folder, device=device, workers=settings.workers)
    watch = partial(_watch, model, heads, device)
    go_on = partial(_continue, folder, settings.init_from is not None)

    def answering(counted: float) -> Any:
        return comparing(model, distances, connect_loss(model, heads, symbols, device, easy=1, counted=counted))

    if "windows" in settings.stages:
        if settings.init_from is None:
            whiten(model)
        go("windows", sees, window_batch, window_loss(model, heads, device), steps=settings.windows_steps,
           lr=settings.windows_rate, on_log=watch)  # fmt: skip
    if "language" in settings.stages:
        go("language", speaks, partial(lesson, eased=settings.init_from is None),
           comparing(model, distances, symbolic_loss(model, symbols, device)), steps=settings.language_steps,
           lr=settings.language_rate, warmup=50)  # fmt: skip
    if "pictures" in settings.stages:
        go_on("windows", sees)
        go("pictures", sees, partial(picture_batch, scenes=8), picture_loss(model, heads, device),
           steps=settings.pictures_steps, lr=settings.pictures_rate, on_log=watch)  # fmt: skip
    if "translate" in settings.stages:
        go_on("pictures", sees)
        go_on("language", speaks)
        pictures = settings.translate_pictures
        go("translate", says, partial(token_batch, pictures=pictures),
           translation_loss(model, symbols, device, pictures), steps=settings.translate_steps,
           lr=settings.translate_rate, log_every=250)  # fmt: skip
    if "connect" in settings.stages:
        go_on("language", speaks)
        go_on("pictures", sees)
        go_on("translate", says)
        go("connect", everything, partial(lecture, whole_from=settings.whole_from), answering(1.0),
           steps=settings.connect_steps, lr=settings.connect_rate)  # fmt: skip
    if "polish" in settings.stages:
        go_on("connect", everything)
        go("polish", everything, partial(encore, first=settings.connect_steps, scenes=settings.polish_scenes),
           answering(settings.polish_counted), steps=settings.polish_steps, lr=settings.polish_rate)  # fmt: skip
    if "export" in settings.stages:
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
