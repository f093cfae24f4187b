"""Gradient checkpointing of decoder layers for a model in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Within the ``with`` block each layer of the language model keeps only its inputs for the backward pass.

    The model's own switch acts in training mode, in which a frozen model must not be. Hooks of a layer run once,
    outside of what is made again; hooks deeper inside would have to be there still when gradients state, so what acts
    inside the language model cannot be used with this. Nothing in a frozen layer is random: no state of chance is kept.
    """
    layers = list(model.get_decoder().layers)
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
