"""Runs the vision tower once and gathers what reducers may ask for."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.backbones.families import Family, Grid, family_of
from lit_reduce.errors import UserError
from lit_reduce.runtime.taps import Tap
from lit_reduce.tokens import VisualTokens

SIGNALS = frozenset({"text", "cls", "encoder"})
IGNORE = -100  # label of a token that is not an answer


@dataclass(frozen=True)
class Encoded:
    """The pictures of a batch after the tower and the projector, one entry for each image.

    Attributes:
        features: ``[n_i, D]`` projected tokens.
        grids: Frames, rows and columns.
        samples: Which prompt of the batch holds the image.
        signals: ``cls`` ``[n_i]`` and ``encoder`` ``[n_i, Dv]`` for each image.
        text: ``[B, T, D]`` embeddings of the prompts' text tokens, or None when nobody asked.
        text_mask: ``[B, T]``, true at real tokens.
    """

    features: list[Tensor]
    grids: list[Grid]
    samples: list[int]
    signals: dict[str, list[Tensor]] = field(default_factory=dict)
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def tokens(self, images: list[int], signals: Iterable[str]) -> VisualTokens:
        """What a reducer sees of some images of equal token count and grid, with the signals that it declared."""
        given = {name: torch.stack([self.signals[name][i] for i in images]) for name in signals if name in self.signals}
        if "text" in signals and self.text is not None and self.text_mask is not None:
            rows = torch.tensor([self.samples[i] for i in images], device=self.text.device)
            given |= {"text": self.text[rows], "text_mask": self.text_mask[rows]}
        return VisualTokens(torch.stack([self.features[i] for i in images]), self.grids[images[0]], given)


@torch.no_grad()
def encode(model: Any, inputs: Mapping[str, Any], signals: Iterable[str] = (), family: Family | None = None) -> Encoded:
    """One pass through tower and projector, for any number of later calls of `compact`.

    Args:
        model: The frozen backbone.
        inputs: What the processor made; ``labels``, if present, mark answer tokens, which no reducer may see.
        signals: The union of what the reducers declare.
        family: Looked up from the model when None.

    Raises:
        UserError: an unknown signal, one that this backbone cannot give, or placeholders that do not fit the images.
    """
    family, wanted = family or family_of(model.config), frozenset(signals)
    if unknown := wanted - SIGNALS:
        raise UserError(f"no backbone gives the signal '{min(unknown)}'; known: {', '.join(sorted(SIGNALS))}")
    given: dict[str, list[Tensor]] = {}
    text, mask = prompt_text(model, inputs) if "text" in wanted else (None, None)
    if inputs.get("pixel_values") is None:
        return Encoded([], [], [], given, text, mask)
    with ExitStack() as stack:
        tap = stack.enter_context(Tap(family.cls_attention(model))) if "cls" in wanted else None
        tower = stack.enter_context(_InputOf(family.projector(model))) if "encoder" in wanted else None
        features = list(_image_features(model, inputs))
    if tap is not None:  # the mean over heads; prefix tokens such as CLS itself come first and are cut off
        given["cls"] = [row[-len(x) :] for row, x in zip(tap.rows[0].mean(1)[:, 0], features, strict=True)]
    if tower is not None:
        given["encoder"] = list(torch.split(tower.seen.flatten(0, -2), [len(x) for x in features]))
    return Encoded(features, family.grids(model, inputs), _owners(model, inputs, features), given, text, mask)


def encoder_keys(model: Any) -> frozenset[str]:
    """Names of the inputs that only the vision tower reads."""
    return frozenset(inspect.signature(model.base_model.get_image_features).parameters) - {"kwargs"}


def placeholders(model: Any, ids: Tensor) -> Tensor:
    """``[B, L]``, true where an image token stands."""
    mask: Tensor = ids == model.config.image_token_id
    return mask


def prompt_text(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, T, D]`` of the text tokens of the prompts, packed to the left, and which are real ``[B, T]``.

    Image tokens, padding and answers (labels other than -100) are left out.
    """
    ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
    real = ~placeholders(model, ids)
    real = real if mask is None else real & mask.bool()
    real = real if labels is None else real & (labels == IGNORE)
    longest = int(real.sum(1).max())
    order = torch.argsort((~real).int(), dim=1, stable=True)[:, :longest]
    text_mask = real.gather(1, order)
    text: Tensor = model.get_input_embeddings()(ids.gather(1, order).masked_fill(~text_mask, 0))
    return text * text_mask[..., None], text_mask


def _image_features(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The call that ``generate`` itself makes."""
    keys = {name: inputs[name] for name in encoder_keys(model) if inputs.get(name) is not None}
    features: list[Tensor] = model.base_model.get_image_features(**keys, return_dict=True).pooler_output
    return features


def _owners(model: Any, inputs: Mapping[str, Any], features: list[Tensor]) -> list[int]:
    rows = placeholders(model, inputs["input_ids"]).nonzero()[:, 0]
    counts = [len(x) for x in features]
    if len(rows) != sum(counts):
        raise UserError(
            f"the prompts hold {len(rows)} image tokens, but the images give {sum(counts)}; "
            "pass exactly the images that the prompts name, and do not truncate the prompt"
        )
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    owners: list[int] = rows[starts.to(rows.device)].tolist()
    return owners


class _InputOf:
    """Keeps the first input of a module's last call while the ``with`` block lasts."""

    seen: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> "_InputOf":
        self.handle = self.module.register_forward_pre_hook(self._keep)
        return self

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0]

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
