"""Checks that a plug-in fits a backbone."""

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
