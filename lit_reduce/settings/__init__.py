"""Typed settings of the commands: the dataclasses, how they are filled, and how they are printed."""

from lit_reduce.options import check
from lit_reduce.settings.groups import BackboneSettings, ReducerSettings
from lit_reduce.settings.render import beside, save, to_yaml
from lit_reduce.settings.resolve import configs_dir, resolve

__all__ = [
    "BackboneSettings", "ReducerSettings", "beside", "check", "configs_dir", "resolve", "save", "to_yaml",
]  # fmt: skip
