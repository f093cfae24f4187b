"""What a model gets in place of pictures: features of any count for each, in the container that its code expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Ragged(list[Tensor]):
    """One ``[k_i, D]`` a picture. Models that expect one tensor of all start by calling one of its methods."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """All rows, moved."""
        return torch.cat(self).to(*args, **kwargs)

    def flatten(self, *_: int) -> Tensor:
        """All rows."""
        return torch.cat(self)


@dataclass
class Visual(BaseModelOutputWithPooling):  # type: ignore[misc]
    """Visual features as ``generate`` hands them to ``forward``, also after it has repeated them for beams.

    Attributes:
        pooler_output: `Ragged`.
        deepstack_features: For each level of a model that has them, one ``[k_i, D]`` a picture.
    """

    deepstack_features: list[list[Tensor]] | None = None

    @classmethod
    def of(cls, features: Sequence[Tensor], levels: list[list[Tensor]] | None = None) -> "Visual":
        """The features of some pictures."""
        return cls(pooler_output=list(features), deepstack_features=levels or None)

    def __setattr__(self, name: str, value: Any) -> None:
        # generate puts new lists here for beams and for chunks of the prompt.
        ragged = name == "pooler_output" and isinstance(value, list)
        super().__setattr__(name, Ragged(value) if ragged else value)
