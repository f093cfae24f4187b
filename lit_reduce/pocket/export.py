"""Writes pocket as plain Hugging Face files: weights in half precision on disk, float32 when loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from lit_reduce.files import atomic_folder
from lit_reduce.pocket.model import build_processor

EXTRA = "recipe.safetensors"  # read-outs and symbols: what further training needs and answering does not


def export(model: LlavaForConditionalGeneration, extra: Mapping[str, nn.Module], folder: Path) -> None:
    """Saves model and processor to ``folder``, readable by the Auto classes; half the size, a rounding of 2^-11.

    Args:
        model: Pocket, with its plain projector.
        extra: What only training needs, by name; goes to a file of its own.
        folder: Appears whole or not at all.
    """
    kept = {f"{part}.{name}": x for part, module in extra.items() for name, x in module.state_dict().items()}
    with atomic_folder(folder) as partial:
        save_plain(model, build_processor(), Path(partial))
        save_file({name: x.cpu().half().contiguous() for name, x in kept.items()}, Path(partial) / EXTRA)


def save_plain(model: Any, processor: Any, folder: Path) -> None:
    """Saves a LLaVA-like model in half precision, to be loaded in float32, and its processor.

    Tensors of the tower have the names that they have in LLaVA's own checkpoints (``vision_tower.vision_model...``),
    which serving engines look for; transformers reads these as well as its newer ones.
    """
    half = model.cpu().to(torch.float16)
    half.config.dtype = half.config.text_config.dtype = half.config.vision_config.dtype = torch.float16
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = {classic(name): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def classic(name: str) -> str:
    """Returns the name that a tensor has in LLaVA's own checkpoints."""
    own = name.removeprefix("vision_tower.").removeprefix("vision_model.")
    return f"vision_tower.vision_model.{own}" if name.startswith("vision_tower.") else name


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
