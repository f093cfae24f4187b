"""Writes pocket as plain Hugging Face files: weights in half precision on disk, float32 when loaded."""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from lit_reduce.files import atomic_folder
from lit_reduce.pocket.model import build_processor


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Saves model and processor to ``folder``, readable by the Auto classes; half the size, a rounding of 2^-11."""
    half = model.cpu().to(torch.float16)
    half.config.dtype = half.config.text_config.dtype = half.config.vision_config.dtype = torch.float16
    with atomic_folder(folder) as partial:
        half.save_pretrained(partial)
        build_processor().save_pretrained(partial)
        config = Path(partial) / "config.json"
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
