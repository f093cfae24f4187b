"""Frozen vision-language models: how to load one by name, and the few facts that differ between families."""

from lit_reduce.backbones.backbone import Backbone, load_backbone, read_config, wrap
from lit_reduce.backbones.families import FAMILIES, Family, family_of
from lit_reduce.backbones.identity import fingerprint, identify

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "family_of",
    "fingerprint",
    "identify",
    "load_backbone",
    "read_config",
    "wrap",
]
