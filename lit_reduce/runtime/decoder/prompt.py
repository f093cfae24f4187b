"""A prompt that the language model is about to read, with the visual tokens of its images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import Grid
from lit_reduce.runtime.encode import IGNORE, placeholders
from lit_reduce.runtime.gather import right_padded


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image inside the language model; a change makes a new object.

    Attributes:
        number: Tells the pictures of a prompt apart.
        row: Which sample of the batch it stands in.
        grid: Frames, rows and columns where it entered.
        columns: ``[n]``, where its tokens stand among the tokens that the layer at hand works on.
        kept_indices: ``[n]``, which of the image's first tokens they are.
        size: ``[n]``, how many of the first tokens each stands for.
        given: Signals from before the language model, one entry a token.
        stages: How many tokens stay from before each decoder layer on.
        cached: How many keys stay in each layer's cache at the end of the prompt.
        entered: Tokens with which it entered.
        keep: Its budget.
        gate: ``[n]``, how far each token is open to the attention of others; None when all of them are.
        since: The layer of its last stage.
        spent: Tokens that the layers before that one worked on, summed.
    """

    number: int
    row: int
    grid: Grid
    columns: Tensor
    kept_indices: Tensor
    size: Tensor
    given: dict[str, Tensor] = field(default_factory=dict)
    stages: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    entered: int = 0
    keep: int = 0
    gate: Tensor | None = None
    since: int = 0
    spent: Tensor | float = 0.0

    @property
    def open(self) -> Tensor:
        """``[n]``, the gates."""
        return torch.ones(self.count, device=self.columns.device) if self.gate is None else self.gate

    @property
    def count(self) -> int:
        """Tokens that are left, n."""
        return len(self.columns)

    def only(self, chosen: Tensor) -> "ImageTokens":
        """The picture with the ``chosen`` ones of its tokens left."""
        given = {name: x[chosen] for name, x in self.given.items()}
        columns, kept_indices, size = self.columns[chosen], self.kept_indices[chosen], self.size[chosen]
        gate = None if self.gate is None else self.gate[chosen]
        return replace(self, columns=columns, kept_indices=kept_indices, size=size, given=given, gate=gate)

    def at(self, layer: int) -> "ImageTokens":
        """The picture at a stage, with what it has spent until there."""
        size = self.count if self.gate is None else self.gate.sum()
        return replace(self, since=layer, spent=self.spent + size * (layer - self.since))

    def gated(self, gate: Tensor) -> "ImageTokens":
        """The picture with further gates ``[n]``."""
        return replace(self, gate=self.open * gate)

    def moved(self, columns: Tensor) -> "ImageTokens":
        """The picture with its tokens at other places."""
        return replace(self, columns=columns)


@dataclass(frozen=True)
class Prompt:
    """What the language model is about to read.

    Attributes:
        pictures: Its images, those of the first sample first.
        real: ``[B, L]`` bool, false at padding.
        text: ``[B, T]`` columns of the prompt's text tokens, packed to the left.
        text_mask: ``[B, T]``, which of them are real.
        last: ``[B]``, the column of the last token of the prompt.
    """

    pictures: list[ImageTokens]
    real: Tensor
    text: Tensor
    text_mask: Tensor
    last: Tensor

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any], counts: Sequence[int], grids: Sequence[Grid]) -> "Prompt":
        """Read a prompt.

        Args:
            model: The backbone.
            inputs: ``input_ids``, ``attention_mask`` and, when training, ``labels``: no reducer sees answer tokens.
            counts: Visual tokens of each image.
            grids: And its grid.
        """
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        visual = placeholders(model, ids)
        asked = real if labels is None else real & (labels == IGNORE)
        rows, columns = torch.cat([part.nonzero() for part in _by_kind(model, ids, visual)]).unbind(1)
        ones = torch.ones(max([*counts, 0]), device=ids.device)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        pictures = [
            ImageTokens(
                i,
                int(rows[start]),
                grid,
                place,
                torch.arange(len(place), device=ids.device),
                ones[: len(place)],
                entered=len(place),
            )
            for i, (start, place, grid) in enumerate(zip(starts, columns.split(list(counts)), grids, strict=True))
        ]
        words = asked & ~visual
        text, text_mask = right_padded(words)
        place = torch.arange(ids.shape[1], device=ids.device)
        return cls(pictures, real, text, text_mask, (asked * place).argmax(1))

    def repeat(self, times: int) -> "Prompt":
        """The prompt of a batch whose samples were each repeated, for beams or several answers."""
        if times == 1:
            return self
        many = [(p.row * times + i, p) for p in self.pictures for i in range(times)]
        pictures = [replace(p, number=number, row=row) for number, (row, p) in enumerate(many)]
        return Prompt(
            pictures, *(x.repeat_interleave(times, 0) for x in (self.real, self.text, self.text_mask, self.last))
        )

    def behind_padding(self) -> "Prompt":
        """The prompt with one more column of padding on its left."""
        pictures = [picture.moved(picture.columns + 1) for picture in self.pictures]
        real = torch.nn.functional.pad(self.real, (1, 0), value=False)
        return replace(self, pictures=pictures, real=real, text=self.text + 1, last=self.last + 1)


def _by_kind(model: Any, ids: Tensor, visual: Tensor) -> list[Tensor]:
    """Where images stand, then where videos stand: the order in which they are encoded."""
    image = visual & (ids == model.config.image_token_id)
    return [image, visual & ~image]
