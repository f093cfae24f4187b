"""The only vocabulary that a reducer knows: visual tokens in, a reduction out, and a budget between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from lit_reduce.errors import UserError


@dataclass(frozen=True)
class Course:
    """The way of B images through a language model, up to the layer where a reducer stands.

    Attributes:
        depth: Layers of the language model.
        tokens: Visual tokens with which each image entered it, N.
        keep: The budget of each image.
        spent: ``[B]``, visual tokens that the layers before worked on, in all; a gated one counts as much as its gate.
        progress: How far training is, from 0 to 1; None at inference, and when training looks at what inference does.
    """

    depth: int
    tokens: int
    keep: int
    spent: Tensor
    progress: float | None = None


@dataclass(frozen=True)
class VisualTokens:
    """The N visual tokens of B images (or videos) at the place where a reducer acts.

    Attributes:
        features: ``[B, N, D]``, the projected tokens that the language model would get.
        grid: Frames, rows and columns; the product differs from N when newline tokens are present.
        signals: What a reducer asked for by name: ``text`` ``[B, T, D]`` prompt embeddings and ``text_mask``
            ``[B, T]`` (true at real prompt tokens), ``cls`` ``[B, N]`` attention of the CLS token (mean over heads),
            ``encoder`` ``[B, N, Dv]`` features of the vision tower before the projector. Between decoder layers also
            ``last`` ``[B, N]``, ``text_rows`` ``[B, T, N]`` and ``image_rows`` ``[B, R, N]``, attention rows (mean over
            heads) of the prompt's last token, of all its text and of some tokens of the image, zero where there are
            fewer; ``place`` ``[B, N]`` int64, which of the image's first tokens these are; ``gate`` ``[B, N]``, what
            earlier stages left open of each.
        layer: The layer of the decoder, the cache or the tower where they stand, from 0; -1 at the projector.
        course: How the images came there, between decoder layers; None elsewhere.
    """

    features: Tensor
    grid: tuple[int, int, int]
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    layer: int = -1
    course: Course | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(f"features must be [B, N, D], not {tuple(self.features.shape)}")

    @property
    def count(self) -> int:
        """N, the number of visual tokens of each image."""
        return self.features.shape[1]

    def signal(self, name: str) -> Tensor:
        """The signal of that name.

        Raises:
            UserError: the backbone gave no such signal.
        """
        if name not in self.signals:
            here = ", ".join(sorted(self.signals)) or "none"
            raise UserError(f"the signal '{name}' is missing (given: {here}); use a reducer that does without it")
        return self.signals[name]


@dataclass(frozen=True)
class Reduction:
    """What a reducer returns: K tokens for each of B images.

    Attributes:
        kept_indices: ``[B, K]`` int64, ascending original indices; they say which position each kept token takes.
        features: ``[B, K, D]``, or None when the new tokens are plain copies of the anchors.
        valid: ``[B, K]`` bool, or None when all are valid. Invalid entries trail and are ignored.
        scores: ``[B, N]``, for overlays and training.
        assignment: ``[B, N]`` int64, which of the K tokens each original one went into, -1 for none.
        size: ``[B, K]``, how many original tokens each stands for, or None when the method does not say.
        memory: ``[B, N, S]``, what layers of the language model may look back at (kind ``recall``); anything.
        weight: ``[B, N]``, of kind ``skip`` only: a token that stays becomes ``h + w (layer(h) - h)``, one that passes
            the layer by ``w h``; None leaves both as they are.
        gate: ``[B, K]`` in [0, 1], between decoder layers in training: by how much later layers attend to each, with
            the gates of earlier stages multiplied in by the runtime. None where all are open.
        losses: The method's own terms by name, ``[B]`` each; `Reducer.own_loss` makes a loss of those of a whole batch.
    """

    kept_indices: Tensor
    features: Tensor | None = None
    valid: Tensor | None = None
    scores: Tensor | None = None
    assignment: Tensor | None = None
    size: Tensor | None = None
    memory: Tensor | None = None
    weight: Tensor | None = None
    gate: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    def gather(self, tokens: VisualTokens) -> Tensor:
        """The reduced tokens ``[B, K, D]``."""
        if self.features is not None:
            return self.features
        width = tokens.features.shape[-1]
        return tokens.features.gather(1, self.kept_indices.unsqueeze(-1).expand(-1, -1, width))


@dataclass(frozen=True)
class Budget:
    """How many tokens of each image stay: a count (int) or a ratio (float in (0, 1])."""

    value: int | float

    def __post_init__(self) -> None:
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            if self.value < 1:
                raise UserError(f"keep={self.value}: at least 1 token per image must stay; give 1 or more")
        elif not isinstance(self.value, float) or not 0 < self.value <= 1:
            raise UserError(f"keep={self.value}: give a count (whole number, 64) or a ratio in (0, 1] (0.25)")

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read ``64``, ``"64"`` (tokens per image), ``0.25``, ``"0.25"`` (ratio) or a ready budget.

        Raises:
            UserError: not a number, or out of range.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            try:
                return cls(float(value) if any(mark in value.lower() for mark in ".enf") else int(value))
            except ValueError:
                raise UserError(f"keep={value!r} is not a number; give a count (64) or a ratio (0.25)") from None
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UserError(f"keep={value!r} is not a number; give a count (64) or a ratio (0.25)")
        return cls(int(value) if isinstance(value, Integral) else float(value))

    def count(self, n: int) -> int:
        """Tokens to keep of ``n``; a ratio keeps at least one.

        Raises:
            UserError: a count above ``n``.
        """
        if isinstance(self.value, float):
            return min(n, max(1, math.floor(self.value * n + 0.5)))
        if self.value > n:
            raise UserError(f"keep={self.value}: an image has only {n} visual tokens here; give at most {n}")
        return self.value
