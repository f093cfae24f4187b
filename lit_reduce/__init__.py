"""Train, ship and plug in small modules that thin out the visual tokens of a frozen vision-language model."""

import importlib
from typing import TYPE_CHECKING, Any

from lit_reduce.version import __version__

if TYPE_CHECKING:
    from lit_reduce.backbones import Backbone, load_backbone
    from lit_reduce.distill.module import Distiller
    from lit_reduce.distill.train import train
    from lit_reduce.errors import UserError
    from lit_reduce.plugin import BackboneId, PluginConfig, load_plugin, push_to_hub, save_plugin
    from lit_reduce.reducer import Reducer, ReducerConfig, ScoringReducer, available, create, register
    from lit_reduce.runtime.attach import attach
    from lit_reduce.settings.train import TrainSettings
    from lit_reduce.tokens import Budget, Reduction, VisualTokens


# Imported at first use, so that the plug-in side (tokens, ops, reducers) never pulls in a model library.
_HOMES = {
    "lit_reduce.backbones": ("Backbone", "load_backbone"),
    "lit_reduce.distill.module": ("Distiller",),
    "lit_reduce.settings.train": ("TrainSettings",),
    "lit_reduce.distill.train": ("train",),
    "lit_reduce.errors": ("UserError",),
    "lit_reduce.plugin": ("BackboneId", "PluginConfig", "load_plugin", "push_to_hub", "save_plugin"),
    "lit_reduce.reducer": ("Reducer", "ReducerConfig", "ScoringReducer", "available", "create", "register"),
    "lit_reduce.runtime.attach": ("attach",),
    "lit_reduce.tokens": ("Budget", "Reduction", "VisualTokens"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Backbone",
    "BackboneId",
    "Budget",
    "Distiller",
    "PluginConfig",
    "Reducer",
    "ReducerConfig",
    "Reduction",
    "ScoringReducer",
    "TrainSettings",
    "UserError",
    "VisualTokens",
    "__version__",
    "attach",
    "available",
    "create",
    "load_backbone",
    "load_plugin",
    "push_to_hub",
    "register",
    "save_plugin",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lit_reduce' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
