"""Plug-ins: folders of three files that carry a reducer from one machine to another."""

from lit_reduce.plugin.checks import check_backbone
from lit_reduce.plugin.format import (
    CARD,
    CONFIG,
    FILES,
    FORMAT_VERSION,
    POSITIONS,
    WEIGHTS,
    BackboneId,
    PluginConfig,
    read_config,
)
from lit_reduce.plugin.load import create_for, load_plugin, open_reducer, resolved_revision
from lit_reduce.plugin.save import push_to_hub, save_plugin

__all__ = [
    "CARD",
    "CONFIG",
    "FILES",
    "FORMAT_VERSION",
    "POSITIONS",
    "WEIGHTS",
    "BackboneId",
    "PluginConfig",
    "check_backbone",
    "create_for",
    "load_plugin",
    "open_reducer",
    "push_to_hub",
    "read_config",
    "resolved_revision",
    "save_plugin",
]
