"""Outputs of a vision encoder with any number of tokens for each image, in the container that model code expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class RaggedFeatures(list[Tensor]):
    """One ``[k_i, D]`` an image. Models that expect one tensor of all start by calling one of its methods."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """All rows, moved."""
        return torch.cat(self).to(*args, **kwargs)

    def flatten(self, *_: int) -> Tensor:
        """All rows."""
        return torch.cat(self)


@dataclass
class VisualOutput(BaseModelOutputWithPooling):  # type: ignore[misc]
    """Visual features as ``generate`` hands them to ``forward``, also after it has repeated them for beams.

    Attributes:
        pooler_output: `RaggedFeatures`.
        deepstack_features: For each level of a model that has them, one ``[k_i, D]`` an image.
    """

    deepstack_features: list[list[Tensor]] | None = None

    @classmethod
    def of(cls, features: Sequence[Tensor], levels: list[list[Tensor]] | None = None) -> "VisualOutput":
        """The features of some images."""
        return cls(pooler_output=list(features), deepstack_features=levels or None)

    def __setattr__(self, name: str, value: Any) -> None:
        # generate puts new lists here for beams and for chunks of the prompt.
        ragged = name == "pooler_output" and isinstance(value, list)
        super().__setattr__(name, RaggedFeatures(value) if ragged else value)
