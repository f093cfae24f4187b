"""Makes pocket-hd from pocket: ``python -m lit_reduce.pocket.hd``; killed, it goes on when started again.

pocket-hd has LLaVA-NeXT's layout: a thumbnail and 2 x 2 tiles of 336 px, 2,880 visual tokens and a newline behind each
of the 48 rows. Its tower, projector and decoder begin as pocket's. It reads scenes of 672 px, put together from four of
pocket's: print of 14 to 26 px, which the thumbnail halves. The tower stays as it is, because a tile looks like a scene;
projector, decoder and newline learn to read five pictures as one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from lit_reduce.console import run
from lit_reduce.data.groups import Group
from lit_reduce.data.jsonl import Row
from lit_reduce.files import atomic_folder
from lit_reduce.pocket.export import save_plain
from lit_reduce.pocket.labels import patch_labels
from lit_reduce.pocket.loop import Losses, fit
from lit_reduce.pocket.model import TEMPLATE, build_tokenizer
from lit_reduce.pocket.questions import FAMILIES, ask, questions
from lit_reduce.pocket.render import render
from lit_reduce.pocket.turns import BOS, pack, turn_mask
from lit_reduce.pocket.world import GRID, PATCH, SIZE, Scene, Thing, make_scene, scene_rng
from lit_reduce.settings import configs_dir, resolve

TILES = 2  # a side
VIEWS = 1 + TILES**2
WIDE = TILES * SIZE
PLACES = GRID**2 + TILES * GRID * (TILES * GRID + 1)  # of a picture in the prompt: thumbnail, rows, newlines
NEWLINE = VIEWS * GRID**2  # index of the newline behind all patches of all views
STREAM = 8  # of randomness, see `scene_rng`
TURNS, TEXT = 16, 240


@dataclass
class HdSettings:
    """Settings of the recipe; configs/pocket_hd.yaml explains each."""

    output: str = "outputs/pocket-hd"
    start: str = "checkpoints/pocket"
    device: str = "auto"
    workers: int = 0
    scenes: int = 3
    shown: int = 640
    steps: int = 720
    whole_from: int = 480
    rate: float = 3e-4


def hd_scene(split: str, index: int) -> tuple[Scene, list[Scene]]:
    """A scene of 672 px, things and all in its own pixels, and the four scenes of pocket that it is drawn from.

    Together the four have about as many things as one scene of pocket: some shapes of each, signs whose colours and
    words differ, one chart at most. So questions stay as clear as there.
    """
    rng, parts = scene_rng(split, index, STREAM), []
    charted, words, colors = int(rng.integers(TILES**2)), set[str | None](), set[str]()
    everything: list[Thing] = []
    chart = None
    for number in range(TILES**2):
        scene = make_scene(split, TILES**2 * index + number)
        left, top = SIZE * (number % TILES), SIZE * (number // TILES)
        shapes = [t for t in scene.shapes if rng.random() < 0.4][:5]
        signs = [t for t in scene.signs if t.word not in words and t.color not in colors][:1]
        words |= {t.word for t in signs}
        colors |= {t.color for t in signs}
        panel = scene.chart if number == charted else None
        things = tuple(t for t in scene.things if t in shapes or t in signs or (panel is not None and t.kind == "bar"))
        parts.append(replace(scene, things=things, chart=panel))
        everything += [replace(t, x=t.x + left, y=t.y + top) for t in things]
        if panel is not None:
            chart = panel[0] + left, panel[1] + top, panel[2] + left, panel[3] + top
    return Scene((parts[0].seed[0], index), "parts", 0, tuple(everything), chart), parts


def draw(parts: Sequence[Scene]) -> Image.Image:
    """The picture of four scenes: RGB, 672 x 672."""
    image = Image.new("RGB", (WIDE, WIDE))
    for number, part in enumerate(parts):
        image.paste(render(part), (SIZE * (number % TILES), SIZE * (number // TILES)))
    return image


def hd_groups(split: str, count: int, turns: int) -> list[Group]:
    """The first ``count`` scenes of a split, each with its questions and answers."""
    groups = []
    for index in range(count):
        scene, parts = hd_scene(split, index)
        asked = tuple((q.prompt, q.answer) for q in questions(scene, turns))
        groups.append(Group(f"hd1-{split}-{index}-{turns}", partial(draw, parts), asked))
    return groups


def hd_rows(split: str, count: int) -> Iterator[Row]:
    """One question a scene, the families in turn; scenes without a clear one of that family are passed over."""
    families, index = list(FAMILIES), 0
    for n in range(count):
        family, question = families[n % len(families)], None
        while question is None:
            scene, parts = hd_scene(split, index)
            question = ask(scene, scene_rng(split, index, 5), family)
            index += 1
        yield Row(question.prompt, draw(parts), question.answer, family=family, source=f"{split}/{index - 1}")


@lru_cache(maxsize=1)
def layout() -> Tensor:
    """Which of 5 x 576 patches stands at each of the 2,928 places of a picture in the prompt; `NEWLINE` behind rows."""
    side = TILES * GRID
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    tile = 1 + row // GRID * TILES + column // GRID
    patch = tile * GRID**2 + row % GRID * GRID + column % GRID
    lines = torch.cat([patch, torch.full((side, 1), NEWLINE)], 1)
    return torch.cat([torch.arange(GRID**2), lines.flatten()])


@lru_cache(maxsize=1)
def build_images() -> LlavaNextImageProcessor:
    """Cuts a picture into thumbnail and tiles."""
    return LlavaNextImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=[[WIDE, WIDE]],
        do_convert_rgb=True,
    )  # fmt: skip


def build_processor() -> LlavaNextProcessor:
    """The processor: pocket's words and template, five views of each picture."""
    return LlavaNextProcessor(
        image_processor=build_images(), tokenizer=build_tokenizer(), patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_from(pocket: Any) -> LlavaNextForConditionalGeneration:
    """pocket-hd with pocket's weights; the newline begins at nought."""
    old = pocket.config
    config = LlavaNextConfig(
        vision_config=old.vision_config, text_config=old.text_config, image_token_id=old.image_token_id,
        vision_feature_layer=old.vision_feature_layer, vision_feature_select_strategy="default",
        image_grid_pinpoints=[[WIDE, WIDE]], image_seq_length=GRID**2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(pocket.state_dict(), strict=False)
    if unexpected or missing != ["model.image_newline"]:
        raise ValueError(f"pocket's weights do not fit: missing {missing}, unexpected {unexpected}")
    torch.nn.init.zeros_(model.model.image_newline)
    model.generation_config = pocket.generation_config
    return model


def hd_batch(step: int, scenes: int, shown: int | None) -> dict[str, Tensor]:
    """Pictures with packed turns.

    Args:
        step: Of the loop.
        scenes: In the batch.
        shown: How many of the 2,928 places the decoder sees, those of things and newlines first; None for all.

    Returns:
        views [B, 5, 3, 336, 336], where [B, P] of the places shown, and what `pack` gives.
    """
    out: dict[str, list[np.ndarray]] = {}
    for i in range(scenes):
        index = step * scenes + i
        scene, parts = hd_scene("train", index)
        turns = [(q.prompt, q.answer) for q in questions(scene, TURNS)]
        views = build_images()(draw(parts), return_tensors="np")["pixel_values"][0]
        # The thumbnail has no labels; a quarter of its patches comes by chance.
        things = [np.zeros(GRID**2), *(patch_labels(part)["kind"] > 0 for part in parts), np.ones(1)]
        rng = scene_rng("train", index, STREAM + 1)
        chance = rng.random(PLACES) + np.concatenate(things)[layout().numpy()] * rng.uniform(0, 1)
        where = np.arange(PLACES) if shown is None else np.sort(np.argsort(-chance)[:shown])
        for key, value in {**pack(turns, TEXT), "views": views.astype(np.float32), "where": where}.items():
            out.setdefault(key, []).append(value)
    return {key: torch.from_numpy(np.stack(values)) for key, values in out.items()}


def hd_logits(model: LlavaNextForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [M, vocabulary] and targets [M] at the answers of a batch of `hd_batch`."""
    where, base = batch["where"], model.model
    with torch.no_grad():
        seen = base.vision_tower(batch["views"].flatten(0, 1)).last_hidden_state[:, 1:]
    seen = seen.unflatten(0, (-1, VIEWS)).flatten(1, 2)
    patch = layout().to(where.device)[where]
    index = patch.clamp(max=NEWLINE - 1)[..., None].expand(-1, -1, seen.shape[-1])
    projected = base.multi_modal_projector(seen.gather(1, index))
    visual = torch.where((patch == NEWLINE)[..., None], base.image_newline.to(projected.dtype), projected)
    embedding = model.get_input_embeddings()
    start = embedding(torch.full((len(where), 1), BOS, device=where.device))
    place = torch.cat([torch.zeros_like(where[:, :1]), 1 + where], 1)
    mask = turn_mask(torch.ones_like(place).bool(), place, batch["turn"], batch["place"], torch.float32)
    text = embedding(batch["ids"])
    hidden = model.get_decoder()(
        inputs_embeds=torch.cat([start, visual.to(text.dtype), text], 1), attention_mask=mask, use_cache=False,
        position_ids=torch.cat([place, 1 + PLACES + batch["place"]], 1),
    ).last_hidden_state[:, place.shape[1] :]  # fmt: skip
    asked = batch["targets"] >= 0
    return model.lm_head(hidden[asked]), batch["targets"][asked]


def hd_loss(model: LlavaNextForConditionalGeneration, device: torch.device) -> Callable[[Any, int], Losses]:
    """Returns the loss of a batch: cross-entropy at the answers."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        logits, targets = hd_logits(model, {key: x.to(device) for key, x in batch.items()})
        right = (logits.argmax(-1) == targets).float().mean()
        return {"loss": F.cross_entropy(logits.float(), targets), "right": right}

    return loss_of


def lecture(step: int, scenes: int, shown: int, whole_from: int) -> dict[str, Tensor]:
    """Parts of pictures until ``whole_from``, then one whole picture a step."""
    return hd_batch(step, scenes, shown) if step < whole_from else hd_batch(step * scenes, 1, None)


def export(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Saves model and processor to ``folder`` as plain Hugging Face files: half precision on disk, float32 loaded."""
    with atomic_folder(folder) as partial_folder:
        save_plain(model, build_processor(), Path(partial_folder))


def make(chosen: HdSettings) -> None:
    """Trains from where it was and exports to ``output/pocket-hd``."""
    folder = Path(chosen.output)
    folder.mkdir(parents=True, exist_ok=True)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if chosen.device == "auto" else chosen.device)
    model = build_from(LlavaForConditionalGeneration.from_pretrained(chosen.start, dtype=torch.float32)).to(device)
    model.model.vision_tower.requires_grad_(False)
    batches = partial(lecture, scenes=chosen.scenes, shown=chosen.shown, whole_from=chosen.whole_from)
    fit("hd", {"model": model}, batches, hd_loss(model, device), steps=chosen.steps, lr=chosen.rate, folder=folder,
        device=device, warmup=50, workers=chosen.workers)  # fmt: skip
    export(model, folder / "pocket-hd")


def main(argv: Sequence[str]) -> None:
    """Resolves the settings and runs the recipe."""
    make(resolve(HdSettings, argv, configs_dir(), "pocket_hd"))


if __name__ == "__main__":
    sys.exit(run(main))
