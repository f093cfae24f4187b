"""Data types at the interface of a reducer: visual tokens in, a reduction out, and a budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from lit_reduce.errors import UserError


@dataclass(frozen=True)
class Course:
    """Progress of B images through the decoder, up to the layer where a reducer acts.

    Attributes:
        depth: Layers of the decoder.
        tokens: Visual tokens of each image that entered the decoder, N.
        keep: Budget of each image.
        spent: ``[B]``, visual tokens that earlier layers processed, summed over layers; a gated token counts as much as
            its gate.
        progress: Progress of training, from 0 to 1; None at inference, and when training evaluates.
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
        signals: Further inputs that a reducer requests by name: ``text`` ``[B, T, D]`` prompt embeddings and
            ``text_mask`` ``[B, T]`` (true at real prompt tokens), ``cls`` ``[B, N]`` attention of the CLS token (mean
            over heads), ``encoder`` ``[B, N, Dv]`` features of the vision tower before the projector. Between decoder
            layers also ``last`` ``[B, N]``, ``text_rows`` ``[B, T, N]`` and ``image_rows`` ``[B, R, N]``, attention
            rows (mean over heads) of the prompt's last token, of all its text and of some tokens of the image, padded
            with zeros; ``place`` ``[B, N]`` int64, original index of each token in its image; ``gate`` ``[B, N]``,
            product of the gates of earlier stages.
        layer: Index of the layer of the decoder, the cache or the tower at which the tokens are, from 0; -1 at the
            projector.
        course: Progress of the images between decoder layers; None elsewhere.
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
        """Number of visual tokens of each image, N."""
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
    """Result of a reducer: K tokens for each of B images.

    Attributes:
        kept_indices: ``[B, K]`` int64, ascending original indices; they determine the position of each kept token.
        features: ``[B, K, D]``, or None if the new tokens are copies of the tokens at ``kept_indices``.
        valid: ``[B, K]`` bool, or None if all are valid. Invalid entries come last and are ignored.
        scores: ``[B, N]``, for overlays and training.
        assignment: ``[B, N]`` int64, the one of the K tokens that each original token was merged into, -1 for none.
        size: ``[B, K]``, number of original tokens that each one represents, or None if the method does not say.
        memory: ``[B, N, S]``, per-token data that layers of the language model read later (kind ``recall``).
        weight: ``[B, N]``, for kind ``skip`` only: a token that stays becomes ``h + w (layer(h) - h)``, one that skips
            the layer becomes ``w h``; None for 1.
        gate: ``[B, K]`` in [0, 1], between decoder layers in training: factor on the attention that later layers pay to
            each token. The runtime multiplies in the gates of earlier stages. None for 1.
        losses: Additional loss terms of the method by name, ``[B]`` each; `Reducer.own_loss` combines those of a batch.
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
    """Number of tokens to keep of each image: a count (int) or a ratio (float in (0, 1])."""

    value: int | float

    def __post_init__(self) -> None:
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            if self.value < 1:
                raise UserError(f"keep={self.value}: at least 1 token per image must stay; give 1 or more")
        elif not isinstance(self.value, float) or not 0 < self.value <= 1:
            raise UserError(f"keep={self.value}: give a count (whole number, 64) or a ratio in (0, 1] (0.25)")

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read a count (``64``, ``"64"``), a ratio (``0.25``, ``"0.25"``) or a budget.

        Raises:
            UserError: Not a number, or out of range.
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
        """Number of tokens to keep of ``n``; a ratio keeps at least one.

        Raises:
            UserError: A count above ``n``.
        """
        if isinstance(self.value, float):
            return min(n, max(1, math.floor(self.value * n + 0.5)))
        if self.value > n:
            raise UserError(f"keep={self.value}: an image has only {n} visual tokens here; give at most {n}")
        return self.value
