"""Rotary embedding of keys that are not in the sequence, by the attention module's own function."""

import sys
from typing import Any

from torch import Tensor

from lit_reduce.errors import UserError


def rotated(attention: Any, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding of an attention module to keys ``[B, G, n, d]``.

    Args:
        attention: The attention module whose keys they join.
        keys: Before rotary embedding.
        cos: ``[B, n, d']``, as the decoder's ``rotary_emb`` gives it for their positions.
        sin: Likewise.

    Raises:
        UserError: this family turns keys in a way of its own.
    """
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise UserError(f"{type(attention).__name__} has no rotary embedding that keys beside the sequence could share")
    result: Tensor = turn(keys, keys, cos, sin)[1]
    return result


def unrotated(attention: Any, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotated`."""
    length = (cos.square() + sin.square())[:, None]  # more than 1 where the model stretches its embedding
    return rotated(attention, keys, cos, -sin) / length
