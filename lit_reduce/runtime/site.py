"""The protocol between `Session` and the handler of each site where reducers act."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lit_reduce.backbones.families import Family, family_of
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import ReducedImages
from lit_reduce.runtime.encode import Encoded
from lit_reduce.runtime.layer_tokens import LayerTokens
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.tokens import Budget

Sites = Mapping[str, tuple[Reducer, Budget]]
Option = Callable[[str], Any]


@dataclass(frozen=True)
class Stats:
    """What the last call kept and how long the reducers took.

    Attributes:
        kept: Visual tokens that are left in the end, over all images.
        total: And before.
        reducer_ms: The reducers' own time in milliseconds.
        layers: Visual tokens that each decoder layer worked on.
        cached: Visual keys that each layer's cache held after the prompt; empty unless a reducer acts there.
    """

    kept: int = 0
    total: int = 0
    reducer_ms: float = 0.0
    layers: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()

    @property
    def per_layer(self) -> float:
        """Visual tokens that a decoder layer works on, averaged over the layers."""
        return sum(self.layers) / len(self.layers) if self.layers else float(self.kept)

    def slower(self, milliseconds: float) -> "Stats":
        """The same with more time for the reducers."""
        return replace(self, reducer_ms=self.reducer_ms + milliseconds)


@dataclass(frozen=True)
class ShortPrompt:
    """A prompt before and after it was shortened.

    Attributes:
        inputs: Of the full prompt.
        short: Of the short one.
        prompt_map: How they relate.
        encoded: The images after tower and projector.
    """

    inputs: Mapping[str, Any]
    short: dict[str, Any]
    prompt_map: PromptMap
    encoded: Encoded


class SiteHandler:
    """What a reducer at one site does to a model and to a prompt; the methods of this base class do nothing.

    A `Session` calls the handlers in the order in which an image meets their sites.

    Attributes:
        shares_encoding: Whether the tower runs as in the plain model, so that its output serves other reducers, too.
        model: The backbone.
        family: Its family.
        sites: The reducer and its budget at each of the sites that this handler serves.
    """

    shares_encoding: ClassVar[bool] = True

    def __init__(self, model: Any, sites: Sites, progress: float | None = None) -> None:  # noqa: ARG002  (of training)
        self.model, self.sites = model, dict(sites)
        self.family: Family = family_of(model.config)

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """Whether this is the handler of a reducer."""
        raise NotImplementedError

    @classmethod
    def tower_signals(cls, reducer: Reducer) -> frozenset[str]:
        """The signals of a reducer that one pass of the vision tower must give."""
        return reducer.signals

    @property
    def signals(self) -> frozenset[str]:
        """`tower_signals` of all reducers here."""
        return frozenset[str]().union(*(self.tower_signals(reducer) for reducer, _ in self.sites.values()))

    @property
    def depth(self) -> int:
        """Layers of the language model."""
        return len(self.model.get_decoder().layers)

    def check(self, alone: bool, positions: str) -> None:  # noqa: ARG002  (others do)
        """Refuse what cannot work, before the model is changed.

        Args:
            alone: Whether no other reducer is attached.
            positions: ``keep`` or ``renumber``.

        Raises:
            UserError: a budget out of range, layers that the model lacks, a combination that cannot be right.
        """
        if tokens := self.family.tokens(self.model.config):
            for _, keep in self.sites.values():
                keep.count(tokens)

    def install(self, patches: Patches) -> None:
        """Put hooks into the model."""

    def keeps_all(self, count: int) -> bool:
        """Whether nothing of an image of ``count`` tokens would be dropped, told without running anything."""
        return all(keep.count(count) >= count for _, keep in self.sites.values())

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded | None:  # noqa: ARG002  (others do)
        """The images of a prompt if they are known here already."""
        return None

    def reduce(self, inputs: Mapping[str, Any], encoded: Encoded, images: ReducedImages) -> ReducedImages:  # noqa: ARG002
        """Reduce the images before the prompt is shortened."""
        return images

    def schedule(self, prompt: ShortPrompt) -> None:
        """Plan what happens while the language model reads the shortened prompt."""

    def reading(self, padded: bool, fresh: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Within the ``with`` block the language model reads what was scheduled last.

        Args:
            padded: Whether a column of padding was put before the prompt.
            fresh: Of a turn without new images, the tokens that the cache does not hold yet.
        """
        return nullcontext()

    def refuse(self, option: Option) -> None:
        """Refuse ways of generating that would give wrong answers.

        Args:
            option: The value of a generation option by its name, None where it is not set.

        Raises:
            UserError: one of them is asked for.
        """

    def refuse_behind_cache(self) -> None:
        """Refuse a new image behind a cache.

        Raises:
            UserError: the reducer cannot take it.
        """

    def record(self, stats: Stats, prompt_map: PromptMap | None) -> tuple[Stats, PromptMap | None]:
        """Add what happened inside the language model to the statistics of a call."""
        return stats, prompt_map

    def thin(self, tokens: LayerTokens) -> LayerTokens:
        """Token counts of the layers with this site's reducers, from those without."""
        return tokens
