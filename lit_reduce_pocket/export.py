"""Writes pocket as plain Hugging Face files: weights in half precision on disk, float32 when loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from lit_reduce.files import atomic_folder
from lit_reduce_pocket.model import build_processor

EXTRA = "recipe.safetensors"  # read-outs and symbols: what further training needs and answering does not


def export(model: LlavaForConditionalGeneration, extra: Mapping[str, nn.Module], folder: Path) -> None:
    """Saves model and processor to ``folder``, readable by the Auto classes; half the size, a rounding of 2^-11.

    Args:
        model: Pocket, with its plain projector.
        extra: What only training needs, by name; goes to a file of its own.
        folder: Appears whole or not at all.
    """
    kept = {f"{part}.{name}": x for part, module in extra.items() for name, x in module.state_dict().items()}
    half = model.cpu().to(torch.float16)
    half.config.dtype = half.config.text_config.dtype = half.config.vision_config.dtype = torch.float16
    with atomic_folder(folder) as partial:
        half.save_pretrained(partial)
        build_processor().save_pretrained(partial)
        save_file({name: x.cpu().half().contiguous() for name, x in kept.items()}, Path(partial) / EXTRA)
        config = Path(partial) / "config.json"
        config.write_text(config.read_text().replace('"float16"', '"float32"'))


def start_from(folder: Path, model: LlavaForConditionalGeneration, extra: Mapping[str, nn.Module]) -> None:
    """Puts the weights of an exported pocket into the parts of the recipe, to train on from there.

    Parts that earlier versions of the recipe did not have begin anew.
    """
    saved = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())
    kept = {name: x.float() for name, x in load_file(folder / EXTRA).items()}
    for part, module in extra.items():
        own = {name.removeprefix(f"{part}."): x for name, x in kept.items() if name.startswith(f"{part}.")}
        if own:
            module.load_state_dict(own)
