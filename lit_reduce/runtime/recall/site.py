"""Handler of reducers of kind ``recall``: at the projector, and again in layers of the language model."""

from contextlib import AbstractContextManager
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.recall import RecallReducer
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.site import PIECES
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.projector import ProjectorSite
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.recall.hooks import RecallHooks, check_attention
from lit_reduce.runtime.recall.memory import ImageMemory
from lit_reduce.runtime.site import Option, ShortPrompt, Sites, Stats


class RecallSite(ProjectorSite):
    """Reduces like any reducer at the projector; the memory of the whole image goes to hooks in the language model."""

    def __init__(self, model: Any, sites: Sites, progress: float | None = None) -> None:
        super().__init__(model, sites, progress)
        reducer: Any = self._only[0]
        self.reducer: RecallReducer = reducer
        self.hooks = RecallHooks(model, reducer)
        self._memory: ImageMemory | None = None

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """See `SiteHandler`."""
        return isinstance(reducer, RecallReducer)

    def check(self, alone: bool, positions: str) -> None:
        """See `SiteHandler`."""
        if not alone or positions != "keep":
            raise UserError(
                f"'{self.reducer.name}' looks back at the whole picture in its original places; attach it alone, and "
                "leave positions=keep"
            )
        super().check(alone, positions)
        if self.reducer.reads == "attention":
            check_attention(self.model)

    def install(self, patches: Patches) -> None:
        """See `SiteHandler`."""
        patches.install(self.hooks)

    def schedule(self, prompt: ShortPrompt) -> None:
        """See `SiteHandler`."""
        self._memory = ImageMemory.of(self.model, self.reducer, prompt.inputs, prompt.short, prompt.prompt_map)

    def reading(self, padded: bool, fresh: int) -> AbstractContextManager[None]:
        """See `SiteHandler`."""
        memory, self._memory = self._memory, None
        return self.hooks.reading(memory.moved(1) if memory is not None and padded else memory, fresh)

    def refuse(self, option: Option) -> None:
        """See `SiteHandler`."""
        if option("prefill_chunk_size"):
            raise UserError(PIECES)

    def record(self, stats: Stats, prompt_map: PromptMap | None) -> tuple[Stats, PromptMap | None]:
        """See `SiteHandler`."""
        return stats.slower(self.hooks.elapsed_ms), prompt_map
