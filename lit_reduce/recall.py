"""Reducers of kind ``recall``: a short stream enters the language model, and its layers look back at whole pictures.

A method writes three things: `Reducer.reduce`, whose reduction is the short stream and carries the ``memory`` of the
picture; `RecallReducer.recalls`, the decoder layers that look back; and `RecallReducer.recall`, what they then get.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lit_reduce.reducer import Reducer
from lit_reduce.tokens import VisualTokens


@dataclass(frozen=True)
class TokenRecall:
    """The short streams of some pictures, about to enter a layer.

    Attributes:
        layer: Which, from 0.
        hidden: ``[B, K, D]``, their hidden states.
        memory: ``[B, N, S]``, what `Reduction.memory` holds of them.
        assignment: ``[B, N]``, which of the K tokens each of the N went into; -1 for none.
    """

    layer: int
    hidden: Tensor
    memory: Tensor
    assignment: Tensor


@dataclass(frozen=True)
class AttentionRecall:
    """Some tokens whose own attention in a layer is done, and which may now ask the pictures of their prompt.

    Attributes:
        layer: Which, from 0.
        queries: ``[B, H, R, d]``, after any rotary embedding.
        scaling: Factor on dot products.
        answer: ``[B, R, H, d]``, what the layer's own attention read for them.
        mass: ``[B, H, R]``, the log-sum-exp of its logits.
        memory: ``[B, N, S]``, what `Reduction.memory` holds, of all pictures of a prompt behind one another.
        real: ``[B, N]``, false where a prompt has fewer.
        row: ``[B, R, N]``, what the layer before paid in attention, mean over heads, to the token of the short stream
            that each of the N went into; 0 for none.
        turn: Turns keys ``[B, M, C]`` to the original positions of the tokens ``[B, M]`` that they stand for, and
            gives them as ``[B, G, M, d]``: what the queries may be compared with.
    """

    layer: int
    queries: Tensor
    scaling: float
    answer: Tensor
    mass: Tensor
    memory: Tensor
    real: Tensor
    row: Tensor
    turn: Callable[[Tensor, Tensor], Tensor]


class RecallReducer(Reducer):
    """A reducer before the language model, some of whose layers call it again.

    Attributes:
        reads: ``tokens``: before a layer, `recall` gets a `TokenRecall` while a prompt is read, and gives new hidden
            states ``[B, K, D]``. ``attention``: in a layer, it gets an `AttentionRecall` of the prompt's last token and
            of each token of the answer, and gives their new attention output ``[B, R, H, d]``.
    """

    kind = "recall"
    site = "projector"
    reads: ClassVar[str] = "tokens"

    def forward(self, tokens: VisualTokens | TokenRecall | AttentionRecall, keep: int = 0) -> Any:
        """Reduces, or looks back: one call for both, so that whoever times or counts a reducer misses nothing."""
        return super().forward(tokens, keep) if isinstance(tokens, VisualTokens) else self.recall(tokens)

    def recalls(self, depth: int) -> Sequence[int]:
        """The layers of a decoder of that depth that look back."""
        raise NotImplementedError(f"{type(self).__name__} must define recalls")

    def recall(self, look: Any) -> Tensor:
        """What a layer gets: see ``reads``. Deterministic, and each sample for itself, as `reduce` is."""
        raise NotImplementedError(f"{type(self).__name__} must define recall")


def layers_from(first: float, depth: int) -> range:
    """All layers from one on: a number, or a part of the depth below 1; never the first layer."""
    return range(int(first) if first >= 1 else max(1, round(first * depth)), depth)
