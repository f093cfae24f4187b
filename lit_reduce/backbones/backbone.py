"""A frozen vision-language model with its processor: pictures and prompts in, model inputs and answers out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lit_reduce.backbones import shapes
from lit_reduce.backbones.families import Family, family_of
from lit_reduce.backbones.identity import identify
from lit_reduce.backbones.thin import check_ratio
from lit_reduce.errors import UserError
from lit_reduce.plugin import BackboneId
from lit_reduce.registry import references

MARK = "\ue000"  # stands for an answer, to see what a chat template writes around it; in no font, in no text
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
            UserError: the prompt holds the processor's own placeholder for a picture, or a picture is too thin.
        """
        token = self.processor.image_token
        groups = [[] if group is None else group if isinstance(group, list) else [group] for group in images]
        groups = [[image.convert("RGB") for image in group] for group in groups]
        for image in (image for group in groups for image in group):
            check_ratio(*image.size)
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
        token = self.processor.image_token
        return self._ids(self._text(prompt, 1, token).rpartition(token)[2])

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Token ids of an answer behind the prompt of one picture, as the chat template writes both, up to its end.

        The end of the turn is the first special token that the template puts behind the answer; the tokenizer's own end
        of text where it puts none, or where there is no template.
        """
        tokenizer = self.processor.tokenizer
        asked = self._text(prompt, 1, self.processor.image_token)
        before, after = self._around_answer(prompt, asked)
        special = (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) - {tokenizer.unk_token_id}
        marks = [token for token in self._ids(after) if token in special]
        end = marks[0] if marks else tokenizer.eos_token_id
        if not before:
            return [*self._ids(answer), end]
        both, first = self._ids(asked + before + answer), self._ids(asked)
        if both[: len(first)] == first:
            return [*both[len(first) :], end]
        return [*self._ids(before + answer), end]  # the prompt's last token would go on: generation begins behind it

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _around_answer(self, prompt: str, asked: str) -> tuple[str, str]:
        """What the template writes between prompt and answer, and behind it; nothing where it has no place for it."""
        if self.processor.chat_template is None:
            return "", ""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        for content in ([{"type": "text", "text": MARK}], MARK):  # some templates take the text of an answer alone
            try:
                whole = self.processor.apply_chat_template([user, {"role": "assistant", "content": content}])
            except (TemplateError, TypeError):
                continue
            if whole.startswith(asked) and whole.count(MARK) == 1:
                before, _, after = whole[len(asked) :].partition(MARK)
                return before, after
        return "", ""

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


def read_config(name_or_path: str | Path, revision: str | None = None) -> Any:
    """The config of a backbone, without its weights; for a ``shape:`` that of the model.

    Raises:
        UserError: not found, not readable, or a family that the table lacks.
    """
    from transformers import AutoConfig

    if str(name_or_path).startswith(shapes.PREFIX):
        return shapes.config_of(str(name_or_path))
    try:
        config = AutoConfig.from_pretrained(_locate(str(name_or_path)), revision=revision)
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    family_of(config)
    return config


def _unloadable(name_or_path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"no backbone can be loaded from '{name_or_path}': {reason}")


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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number = _dtype(dtype) if dtype is not None else torch.float32 if place.type == "cpu" else "auto"
    if str(name_or_path).startswith(shapes.PREFIX):
        return wrap(shapes.load_shape(str(name_or_path), number, place), shapes.NoProcessor())
    source = _locate(str(name_or_path))
    read_config(source, revision)
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=number, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unloadable(name_or_path, error) from error
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
