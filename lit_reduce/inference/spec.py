"""A plan is a reducer at a budget; here it is found by name and run once, from model inputs to answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
    """How many tokens stay, and who chooses them; ``Plan()`` is the plain backbone on all of them.

    Attributes:
        reducer: The reducer, or None for all tokens.
        keep: Its budget: tokens per image, or a ratio.
        positions: ``keep`` or ``renumber``.
        trained_for: What the plug-in says about itself; None for yardsticks.
    """

    reducer: Reducer | None = None
    keep: int | float = 1.0
    positions: str = "keep"
    trained_for: PluginConfig | None = None

    @property
    def signals(self) -> frozenset[str]:
        """What one shared pass of the vision tower must give beside the features."""
        if self.reducer is None or not self.shares_encoding:
            return frozenset()
        return tower_signals(self.reducer)

    @property
    def shares_encoding(self) -> bool:
        """Whether the tower runs as in the plain model, and all that is dropped is dropped behind it."""
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


def find_spec(chosen: ReducerSettings, keep: int | float | str) -> ReducerSpec:
    """The plan for a yardstick's name, a plug-in's folder or hub id, or ``none``.

    Raises:
        UserError: No such reducer, a damaged plug-in, a bad budget, options that do not fit.
    """
    budget = Budget.parse(keep).value
    if chosen.name == "none":
        return ReducerSpec()
    reducer, config = open_reducer(chosen.name, chosen.options, chosen.revision)
    return ReducerSpec(reducer, budget, "keep" if config is None else config.positions, config)


@torch.inference_mode()
def generate(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    plan: ReducerSpec,
    max_new_tokens: int,
    encoded: Encoded | None = None,
) -> tuple[list[str], PromptMap | None]:
    """Greedy answers to a batch under a plan.

    Args:
        backbone: The model.
        inputs: What ``backbone.prepare`` gave.
        plan: Which tokens stay.
        max_new_tokens: The longest answer.
        encoded: The images' encoding when several plans share it.

    Returns:
        One answer a prompt, and what was kept (None when the plan keeps all).
    """
    if plan.reducer is None:
        sequences: Tensor = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return backbone.decode(sequences, inputs), None
    with attach(backbone.model, plan.reducer, plan.keep, plan.positions) as attachment:
        if encoded is not None and plan.shares_encoding:
            attachment.share(encoded)
        sequences = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return backbone.decode(sequences, inputs), attachment.prompt_map


def visual_counts(backbone: Backbone, inputs: Mapping[str, Any]) -> list[int]:
    """Visual tokens of each prompt before any reduction, those of videos among them."""
    counts: list[int] = placeholders(backbone.model, inputs["input_ids"]).sum(1).tolist()
    return counts
