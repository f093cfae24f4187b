"""Writes the reference models as plain Hugging Face files: weights in half precision on disk, float32 when loaded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from lit_reduce.files import atomic_folder
from lit_reduce_pocket.model import build_processor

WEIGHTS, OWN = "model.safetensors", "model-own.safetensors"
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
        save_half(model, build_processor(), Path(partial))
        save_file({name: x.cpu().half().contiguous() for name, x in kept.items()}, Path(partial) / EXTRA)


def save_half(model: Any, processor: Any, folder: Path) -> None:
    """Saves a model and its processor to an existing folder."""
    half = model.cpu().to(torch.float16)
    half.config.dtype = half.config.text_config.dtype = half.config.vision_config.dtype = torch.float16
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def share_weights(folder: Path, base: Path) -> None:
    """Removes from an exported model the tensors that another model beside it holds under the same name.

    The index of ``folder`` then names two files: its own, and that of ``base``. transformers reads the files of an
    index in the order of their names, so tensors of the first replace those of ``base`` (``..`` sorts first).

    Args:
        folder: An exported model with one file of weights.
        base: The folder of the other model, which stays as it is.
    """
    weights, held = load_file(folder / WEIGHTS), load_file(base / WEIGHTS)
    own = {name: x for name, x in weights.items() if name not in held or not torch.equal(x, held[name])}
    other = Path(os.path.relpath(base, folder)) / WEIGHTS
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in weights.values())},
        "weight_map": {name: OWN if name in own else other.as_posix() for name in sorted(weights)},
    }
    save_file(own, folder / OWN, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / WEIGHTS).unlink()


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
