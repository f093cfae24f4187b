"""Checks of a plug-in: that it fits a backbone, that its numbers are finite; and the digest of its weights."""

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.plugin.format import BackboneId, PluginConfig


def check_backbone(config: PluginConfig, backbone: BackboneId) -> None:
    """Refuse a backbone that the plug-in was not trained on.

    Raises:
        UserError: Another width, vision width or set of weights.
    """
    ours = config.backbone
    start = f"this {config.reducer} plug-in was trained on {ours.id}"
    for what, mine, theirs in (
        ("hidden size", ours.hidden_size, backbone.hidden_size),
        ("vision hidden size", ours.vision_hidden_size, backbone.vision_hidden_size),
    ):
        if mine != theirs:
            raise UserError(f"{start} with {what} {mine}, but {backbone.id} has {theirs}; train one for {backbone.id}")
    if ours.hash != backbone.hash:
        raise UserError(
            f"{start} (weights {ours.hash[:12]}), but {backbone.id} has other weights ({backbone.hash[:12]});"
            f" use that backbone or train a plug-in for this one"
        )


def not_finite(state: Mapping[str, Tensor]) -> str:
    """Which weights hold NaN or infinity, in words; "" where none does."""
    bad = [name for name, x in state.items() if x.is_floating_point() and not x.float().isfinite().all()]
    return (
        f"{bad[0]} holds numbers that are not finite{f' ({len(bad)} such weights)' if bad[1:] else ''}" if bad else ""
    )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and all values of some weights."""
    return hashlib.sha256(
        save({name: weight.detach().cpu().clone().contiguous() for name, weight in state.items()})
    ).hexdigest()
