"""What a benchmark runs on: a batch of equal prompts, and pictures that are encoded once for all runs."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lit_reduce.backbones import Backbone
from lit_reduce.backbones.shapes import NoProcessor, example
from lit_reduce.errors import UserError

VISUAL = 576


def workload(backbone: Backbone, batch: int, visual: int | None, text: int) -> dict[str, Any]:
    """Inputs of ``batch`` equal prompts with one picture each: of any size for a shape, by the processor otherwise.

    Raises:
        UserError: ``visual`` is given where the processor decides, or the geometry does not allow it.
    """
    if isinstance(backbone.processor, NoProcessor):
        return dict(example(backbone.model, batch, visual or VISUAL, text))
    if visual is not None:
        raise UserError(f"visual={visual} needs a shape: backbone; here the processor makes the visual tokens")
    noise = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return backbone.prepare([Image.fromarray(noise.numpy())] * batch, [" ".join(["what"] * text)] * batch)


@contextmanager
def pictures_given(backbone: Backbone, inputs: dict[str, Any]) -> Iterator[None]:
    """Encode the pictures once; within the block the tower does not run, and each call gets these features.

    For a shape, whose tower makes noise of noise, it does not run at all.
    """
    base = backbone.model.base_model
    plain = base.get_image_features
    if isinstance(backbone.processor, NoProcessor):
        known = _noise(backbone.model, inputs)
    else:
        keys = inspect.signature(plain).parameters.keys() & inputs.keys()
        known = plain(**{name: inputs[name] for name in keys}, return_dict=True)

    @functools.wraps(plain)
    def features(*_: Any, **__: Any) -> Any:
        return type(known)(**known)

    vars(base)["get_image_features"] = features
    try:
        yield
    finally:
        del vars(base)["get_image_features"]


def _noise(model: Any, inputs: dict[str, Any]) -> Any:
    """One ``[N, D]`` for each prompt's picture, with the spread of word embeddings."""
    counts = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    width, generator = model.config.get_text_config().hidden_size, torch.Generator().manual_seed(3)
    features = [0.02 * torch.randn(count, width, generator=generator) for count in counts]
    return BaseModelOutputWithPooling(pooler_output=[x.to(model.device, model.dtype) for x in features])
