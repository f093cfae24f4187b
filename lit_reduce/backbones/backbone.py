"""A frozen vision-language model with its processor: pictures and prompts in, model inputs and answers out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lit_reduce.backbones import shapes
from lit_reduce.backbones.families import Family, family_of
from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import BackboneId
from lit_reduce.registry import references

Pictures = Image.Image | list[Image.Image] | None


@dataclass
class Backbone:
    """A model that reducers are plugged into, ready to run and frozen.

    Attributes:
        model: The transformers model.
        processor: Its processor.
        identity: What a plug-in records and checks.
        family: The facts that differ between families.
    """

    model: Any
    processor: Any
    identity: BackboneId
    family: Family

    def prepare(self, images: Sequence[Pictures], prompts: Sequence[str]) -> dict[str, Any]:
        """Model inputs of a batch, padded on the left, on the model's device.

        Args:
            images: For each prompt one picture, a list of pictures, or None.
            prompts: One question each; the processor's chat template is put around it where there is one.

        Raises:
            UserError: the prompt holds the processor's own placeholder for a picture.
        """
        token = self.processor.image_token
        groups = [[] if group is None else group if isinstance(group, list) else [group] for group in images]
        groups = [[image.convert("RGB") for image in group] for group in groups]
        texts = [self._text(prompt, len(group), token) for group, prompt in zip(groups, prompts, strict=True)]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=groups if any(groups) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        pixels = {name: x.to(self.model.device) for name, x in inputs.items() if isinstance(x, Tensor)}
        return {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in pixels.items()}

    def _text(self, prompt: str, pictures: int, token: str) -> str:
        if self.processor.chat_template is None:
            return prompt if token in prompt else f"{token}\n" * pictures + prompt
        if token in prompt:
            raise UserError(f"the prompt holds '{token}', which stands for a picture; leave it out")
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def after_picture(self, prompt: str) -> list[int]:
        """Token ids that follow the picture in the prompt of one picture, without its placeholders."""
        token, tokenizer = self.processor.image_token, self.processor.tokenizer
        text = self._text(prompt, 1, token)
        ids: list[int] = tokenizer(text.rpartition(token)[2], add_special_tokens=False).input_ids
        return ids

    def decode(self, sequences: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """The answers in ``sequences`` ``[B, L]``: the tokens after the prompt of ``inputs``, as stripped text."""
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def wrap(model: Any, processor: Any) -> Backbone:
    """Make a backbone of a loaded model and processor; freezes the model.

    Raises:
        UserError: the family is unknown.
    """
    family = family_of(model.config)
    model.eval().requires_grad_(False)
    return Backbone(model, processor, identify(model), family)


def load_backbone(
    name_or_path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Backbone:
    """Load a backbone by name.

    Args:
        name_or_path: A folder, a reference model of an installed package (`lit_reduce.registry`), a hub id, or
            ``shape:NAME`` for the layers of a well-known model with random weights (`lit_reduce.backbones.shapes`).
        dtype: A torch dtype or its name; by default float32 on the CPU, the checkpoint's own elsewhere.
        device: By default the GPU where there is one.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: not found, not readable, an unknown dtype, or a family that the table lacks.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number = _dtype(dtype) if dtype is not None else torch.float32 if place.type == "cpu" else "auto"
    if str(name_or_path).startswith(shapes.PREFIX):
        return wrap(shapes.load_shape(str(name_or_path), number, place), shapes.NoProcessor())
    source = _locate(str(name_or_path))
    try:
        family_of(AutoConfig.from_pretrained(source, revision=revision))
        model, found = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=number, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no backbone can be loaded from '{name_or_path}': {reason}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with noise
        raise UserError(
            f"the backbone '{name_or_path}' is incomplete: {missing[0]} is missing ({len(missing)} weights)"
        )
    return wrap(model.to(place), processor)


def _dtype(dtype: str | torch.dtype) -> Any:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(found, torch.dtype):
        raise UserError(f"unknown dtype '{dtype}'; use float32, bfloat16, float16 or auto")
    return "auto" if dtype == "auto" else found


def _locate(name: str) -> str:
    reference = None if Path(name).is_dir() else references().get(name)
    return name if reference is None else str(reference.folder())
