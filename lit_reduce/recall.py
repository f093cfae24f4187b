"""Base class of reducers of kind ``recall``: few tokens enter the language model, and some of its layers read the rest.

A subclass defines `Reducer.reduce`, whose reduction contains the tokens that enter the model and the ``memory`` of the
image; `RecallReducer.recalls`, the decoder layers that read the memory; and `RecallReducer.recall`, what they compute
from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lit_reduce.reducer import Reducer
from lit_reduce.tokens import VisualTokens


@dataclass(frozen=True)
class TokenRecall:
    """Input of `RecallReducer.recall` before a layer: reduced tokens of some images and their memory.

    Attributes:
        layer: Index of the layer, from 0.
        hidden: ``[B, K, D]``, hidden states of the reduced tokens.
        memory: ``[B, N, S]``, `Reduction.memory` of the images.
        assignment: ``[B, N]``, the one of the K tokens that each original token was merged into; -1 for none.
    """

    layer: int
    hidden: Tensor
    memory: Tensor
    assignment: Tensor


@dataclass(frozen=True)
class AttentionRecall:
    """Input of `RecallReducer.recall` inside a layer: queries, their self-attention output, and the images' memory.

    Attributes:
        layer: Index of the layer, from 0.
        queries: ``[B, H, R, d]``, after the rotary embedding.
        scaling: Factor on dot products.
        answer: ``[B, R, H, d]``, output of the layer's own attention.
        mass: ``[B, H, R]``, log-sum-exp of its logits.
        memory: ``[B, N, S]``, `Reduction.memory` of all images of a prompt, concatenated.
        real: ``[B, N]``, false at padding.
        row: ``[B, R, N]``, attention (mean over heads) that the previous layer paid to the reduced token that each of
            the N tokens was merged into; 0 for none.
        turn: Applies the rotary embedding at the original positions of the tokens ``[B, M]`` to keys ``[B, M, C]`` and
            returns them as ``[B, G, M, d]``, ready for dot products with the queries.
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
    """A reducer before the language model that some of its layers call again.

    Attributes:
        reads: Input of `recall`. ``tokens``: before a layer, during prefill, it gets a `TokenRecall` and returns new
            hidden states ``[B, K, D]``. ``attention``: inside a layer, it gets an `AttentionRecall` of the prompt's
            last token and of each generated token, and returns their attention output ``[B, R, H, d]``.
    """

    kind = "recall"
    site = "projector"
    reads: ClassVar[str] = "tokens"

    def forward(self, tokens: VisualTokens | TokenRecall | AttentionRecall, keep: int = 0) -> Any:
        """Call `reduce` or `recall`, depending on the input, so that hooks on one method time and count both."""
        return super().forward(tokens, keep) if isinstance(tokens, VisualTokens) else self.recall(tokens)

    def recalls(self, depth: int) -> Sequence[int]:
        """Indices of the layers of a decoder of that depth that call `recall`."""
        raise NotImplementedError(f"{type(self).__name__} must define recalls")

    def recall(self, look: Any) -> Tensor:
        """Output of a layer, see ``reads``; deterministic and independent per sample, as `reduce` is."""
        raise NotImplementedError(f"{type(self).__name__} must define recall")


def layers_from(first: float, depth: int) -> range:
    """All layers from ``first`` on: an index, or a fraction of the depth if below 1; never layer 0."""
    return range(int(first) if first >= 1 else max(1, round(first * depth)), depth)
