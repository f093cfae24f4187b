"""A reducer at a budget: finding it by name, and running the model with it once, from inputs to answers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lit_reduce.backbones import Backbone
from lit_reduce.plugin import PluginConfig, check_backbone, open_reducer
from lit_reduce.reducer import Reducer
from lit_reduce.runtime import attach
from lit_reduce.runtime.encode import Encoded, placeholders
from lit_reduce.runtime.handlers import shares_encoding, tower_signals
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.settings import ReducerSettings
from lit_reduce.tokens import Budget


@dataclass(frozen=True)
class ReducerSpec:
    """A reducer with its budget; ``ReducerSpec()`` is the plain backbone on all tokens.

    Attributes:
        reducer: The reducer, or None for all tokens.
        keep: Its budget: tokens per image, or a ratio.
        positions: ``keep`` or ``renumber``.
        trained_for: The plug-in's config; None for a reducer that was made by name.
    """

    reducer: Reducer | None = None
    keep: int | float = 1.0
    positions: str = "keep"
    trained_for: PluginConfig | None = None

    @cached_property
    def fingerprint(self) -> tuple[Any, ...]:
        """Everything about the spec that decides an answer; equal for equal specs in any process."""
        if self.reducer is None:
            return ()
        state = {name: weight.contiguous() for name, weight in self.reducer.state_dict().items()}
        weights = hashlib.sha256(save(state)).hexdigest()
        return self.reducer.name, self.reducer.config, weights, self.positions, self.keep

    @property
    def signals(self) -> frozenset[str]:
        """The signals that a shared pass of the vision tower must return beside the features."""
        if self.reducer is None or not self.shares_encoding:
            return frozenset()
        return tower_signals(self.reducer)

    @property
    def shares_encoding(self) -> bool:
        """Whether the vision tower runs as in the plain model, so that its output can be shared."""
        return self.reducer is None or shares_encoding(self.reducer)

    def check(self, backbone: Backbone) -> None:
        """Refuse a plug-in of another backbone, and a budget above its token count, before anything runs.

        Where the count depends on the picture, each picture is checked when its turn comes.

        Raises:
            UserError: One of the two.
        """
        if self.trained_for is not None:
            check_backbone(self.trained_for, backbone.identity)
        if self.reducer is not None and backbone.identity.tokens:
            Budget.parse(self.keep).count(backbone.identity.tokens)


def find_spec(settings: ReducerSettings, keep: int | float | str) -> ReducerSpec:
    """The spec for the name of a reducer, a plug-in's folder or hub id, or ``none``.

    Raises:
        UserError: No such reducer, a damaged plug-in, a bad budget, options that do not fit.
    """
    budget = Budget.parse(keep).value
    if settings.name == "none":
        return ReducerSpec()
    reducer, config = open_reducer(settings.name, settings.options, settings.revision)
    return ReducerSpec(reducer, budget, "keep" if config is None else config.positions, config)


@torch.inference_mode()
def generate(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    spec: ReducerSpec,
    max_new_tokens: int,
    encoded: Encoded | None = None,
) -> tuple[list[str], PromptMap | None]:
    """Generate greedy answers to a batch.

    Args:
        backbone: The model.
        inputs: What ``backbone.prepare`` gave.
        spec: The reducer and its budget.
        max_new_tokens: The longest answer.
        encoded: The encoded images, when several specs share them.

    Returns:
        One answer for each prompt, and how the short prompt relates to the full one (None when all tokens stay).
    """
    if spec.reducer is None:
        sequences: Tensor = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return backbone.decode(sequences, inputs), None
    with attach(backbone.model, spec.reducer, spec.keep, spec.positions) as attachment:
        if encoded is not None and spec.shares_encoding:
            attachment.share(encoded)
        sequences = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return backbone.decode(sequences, inputs), attachment.prompt_map


def visual_counts(backbone: Backbone, inputs: Mapping[str, Any]) -> list[int]:
    """Visual tokens of each prompt before any reduction, those of videos among them."""
    counts: list[int] = placeholders(backbone.model, inputs["input_ids"]).sum(1).tolist()
    return counts
