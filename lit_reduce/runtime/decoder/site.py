"""Handler of the sites ``decoder`` and ``cache``: between the layers of the language model, and in its cache."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.runtime.decoder.hooks import DecoderHooks
from lit_reduce.runtime.decoder.prompt import Prompt
from lit_reduce.runtime.decoder.schedule import drops_tokens, schedule_prompt, stages_of
from lit_reduce.runtime.layer_tokens import LayerTokens, layer_counts
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.site import Option, ShortPrompt, SiteHandler, Sites, Stats

INSIDE_SITES = ("decoder", "cache")
PIECES = (
    "a reducer inside the language model ranks by the end of the prompt, which the first chunks do not have; "
    "leave out prefill_chunk_size"
)


class DecoderSite(SiteHandler):
    """One set of hooks in the language model for the reducers of both sites."""

    def __init__(self, model: Any, sites: Sites, progress: float | None = None) -> None:
        super().__init__(model, sites, progress)
        self.hooks = DecoderHooks(model, **{site: reducer for site, (reducer, _) in sites.items()}, progress=progress)
        self._prompt: Prompt | None = None

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """See `SiteHandler`."""
        return reducer.site in INSIDE_SITES

    @classmethod
    def tower_signals(cls, reducer: Reducer) -> frozenset[str]:
        """See `SiteHandler`: the others come from the language model."""
        return from_tower(reducer)

    def check(self, alone: bool, positions: str) -> None:
        """See `SiteHandler`."""
        check_layers(self.model, self.sites, self.family.tokens(self.model.config))
        super().check(alone, positions)

    def install(self, patches: Patches) -> None:
        """See `SiteHandler`."""
        patches.install(self.hooks)

    def keeps_all(self, count: int) -> bool:
        """See `SiteHandler`."""
        counts = [
            left
            for reducer, keep in self.sites.values()
            for left in stages_of(reducer, self.depth, count, keep.count(count)).values()
        ]
        return min(counts) >= count

    def schedule(self, prompt: ShortPrompt) -> None:
        """See `SiteHandler`."""
        planned = schedule_prompt(self.model, prompt.short, prompt.prompt_map, prompt.encoded, self.sites)
        self._prompt = planned if drops_tokens(planned) else None

    def reading(self, padded: bool, fresh: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """See `SiteHandler`."""
        prompt, self._prompt = self._prompt, None
        return self.hooks.reading(prompt.behind_padding() if prompt is not None and padded else prompt)

    def refuse(self, option: Option) -> None:
        """See `SiteHandler`."""
        if option("prefill_chunk_size"):
            raise UserError(PIECES)
        if "cache" not in self.sites:
            return
        if option("use_cache") is False:
            raise UserError("a reducer at the cache has nothing to act on with use_cache=False")
        if option("prompt_lookup_num_tokens") or option("assistant_model") is not None:
            raise UserError(
                "a reducer at the cache acts after the prompt, but assisted decoding checks its first guesses together "
                "with the prompt; leave out the assistant"
            )

    def record(self, stats: Stats, prompt_map: PromptMap | None) -> tuple[Stats, PromptMap | None]:
        """See `SiteHandler`."""
        hooks = self.hooks
        if prompt_map is None or not prompt_map.kept or not hooks.counts:
            return stats, prompt_map
        times = len(hooks.pictures) // len(prompt_map.kept)  # beams and repeated samples count once
        first = [i for i, picture in enumerate(hooks.pictures) if picture.row % times == 0]
        left = [hooks.pictures[i] for i in first]
        counts = [[count[i] for i in first] for count in hooks.counts]
        mean = [sum(one) / len(one) for one in zip(*counts, strict=True)] if "decoder" in self.sites else []
        before = prompt_map.kept_indices
        kept_indices = [index[picture.kept_indices] for index, picture in zip(before, left, strict=True)]
        elapsed, kept = prompt_map.reducer_ms + hooks.elapsed_ms, [picture.count for picture in left]
        layers, cached = tuple(map(sum, counts)), tuple(count // times for count in hooks.cached)
        return Stats(sum(kept), stats.total, elapsed, layers, cached), replace(
            prompt_map, kept_indices=kept_indices, kept=kept, reducer_ms=elapsed, layers=mean
        )

    def thin(self, tokens: LayerTokens) -> LayerTokens:
        """See `SiteHandler`."""
        entering, depth = tokens.decoder[0], len(tokens.decoder)
        for site, (reducer, budget) in self.sites.items():
            keep = budget.count(entering)
            if site == "decoder":
                counts = layer_counts(reducer, depth, entering, keep, reducer.kind == "skip")
                tokens = replace(tokens, decoder=counts, cached=counts)
            elif keep < entering:
                stages = layer_counts(reducer, depth, entering, keep, alone=True)
                tokens = replace(tokens, cached=stages)
        return tokens


def check_layers(model: Any, sites: Sites, tokens: int) -> None:
    """Refuse reducers that cannot act at the layers of this language model.

    Args:
        model: The backbone.
        sites: The reducers with their budgets.
        tokens: Visual tokens of an image, 0 where that depends on the image.

    Raises:
        UserError: layers that the decoder lacks, a signal that nothing gives, a kernel that cannot work on a subset.
    """
    kernel, depth = model.get_decoder().config._attn_implementation or "", len(model.get_decoder().layers)
    if "flex" in kernel or "paged" in kernel:
        raise UserError(f"the attention kernel '{kernel}' cannot work on some of the tokens; use sdpa")
    for reducer, keep in sites.values():
        # Where the count depends on the image, any large one tells whether the layers exist.
        some = tokens or 1024 * (keep.value if isinstance(keep.value, int) else 1)
        stages_of(reducer, depth, some, keep.count(some))
        from_tower(reducer)
