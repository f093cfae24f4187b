"""Handler of kind ``register`` at the decoder: learned tokens that read images inside the language model."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch.nn.functional import pad

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import ReducedImages
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.runtime.decoder.compressed_kv import CompressedKV, check_projections, compress, injected
from lit_reduce.runtime.decoder.schedule import stages_of
from lit_reduce.runtime.decoder.site import check_layers
from lit_reduce.runtime.encode import Encoded
from lit_reduce.runtime.layer_tokens import LayerTokens
from lit_reduce.runtime.site import Option, ShortPrompt, SiteHandler, Sites


class CompressedKVSite(SiteHandler):
    """Two passes for each prompt with an image: the learned tokens read it, then the model reads what they left.

    Attributes:
        given: The `CompressedKV` that the next prompt is to use; None to make one.
    """

    def __init__(self, model: Any, sites: Sites, progress: float | None = None) -> None:
        super().__init__(model, sites, progress)
        self.reducer, self.keep = self.sites["decoder"]
        self.given: CompressedKV | None = None
        self._made: CompressedKV | None = None
        self._reads: tuple[CompressedKV, dict[str, Any]] | None = None

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """See `SiteHandler`."""
        return (reducer.kind, reducer.site) == ("register", "decoder")

    @classmethod
    def tower_signals(cls, reducer: Reducer) -> frozenset[str]:
        """See `SiteHandler`."""
        return from_tower(reducer)

    def check(self, alone: bool, positions: str) -> None:
        """See `SiteHandler`."""
        if not alone:
            raise UserError(f"the tokens of '{self.reducer.name}' read the whole picture; attach it alone")
        check_layers(self.model, self.sites, self.family.tokens(self.model.config))
        super().check(alone, positions)
        if self.family.looks_ahead:
            raise UserError(
                f"pictures or words of '{self.family.name}' see what comes behind them, and so would see the learned "
                f"tokens of '{self.reducer.name}'; use a reducer at the projector"
            )
        check_projections(self.model, self.reducer)

    def keeps_all(self, count: int) -> bool:
        """See `SiteHandler`."""
        return min(stages_of(self.reducer, self.depth, count, self.keep.count(count)).values()) >= count

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded | None:
        """See `SiteHandler`: those of the given `CompressedKV`, spread over the batch if it is one for all."""
        if self.given is None:
            return None
        if len(self.given.words) == 1:
            self.given = self.given.of([0] * len(inputs["input_ids"]))
        return self.given.encoded

    def reduce(self, inputs: Mapping[str, Any], encoded: Encoded, images: ReducedImages) -> ReducedImages:  # noqa: ARG002
        """See `SiteHandler`."""
        compressed, self.given = self.given, None
        if compressed is None:
            compressed = self.compress(inputs, encoded)
            elapsed = compressed.elapsed_ms
        else:
            _compare(compressed, inputs)
            elapsed = 0.0
        self._made = compressed
        return replace(compressed.images, elapsed_ms=elapsed)

    def compress(self, inputs: Mapping[str, Any], encoded: Encoded) -> CompressedKV:
        """The first pass for a batch, once for each picture."""
        counts, pictures = set(encoded.counts), encoded.pictures
        if len(counts) != 1:
            raise UserError(
                f"'{self.reducer.name}' takes pictures of equal token count in a batch; give them one by one"
            )
        keep = self.keep.count(counts.pop())
        if not pictures:
            return compress(self.model, self.reducer, inputs, encoded, keep)
        rows = [pictures.index(picture) for picture in range(max(pictures) + 1)]
        first = {name: x[rows] for name, x in inputs.items()}
        return compress(self.model, self.reducer, first, encoded.each(rows), keep).of(pictures)

    def schedule(self, prompt: ShortPrompt) -> None:
        """See `SiteHandler`."""
        compressed, self._made = self._made, None
        assert compressed is not None
        self._reads = compressed, prompt.short

    def reading(self, padded: bool, fresh: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """See `SiteHandler`."""
        reads, self._reads = self._reads, None
        if reads is None:
            return nullcontext()
        compressed, short = reads
        if padded:
            short = {name: pad(short[name], (1, 0)) for name in ("input_ids", "attention_mask")}
        return injected(self.model, compressed, short)

    def refuse(self, option: Option) -> None:
        """See `SiteHandler`."""
        if option("prefill_chunk_size"):
            raise UserError("learned tokens stand in a prompt that arrives whole; leave out prefill_chunk_size")

    def refuse_behind_cache(self) -> None:
        """See `SiteHandler`."""
        raise UserError(
            "learned tokens read a picture with the words before it, not with a cache; "
            "pass the whole conversation and no cache"
        )

    def thin(self, tokens: LayerTokens) -> LayerTokens:
        """See `SiteHandler`: before its tokens stand for the image, all layers read the prompt up to it."""
        entering, depth = tokens.decoder[0], len(tokens.decoder)
        keep = self.keep.count(entering)
        if keep == entering:
            return tokens
        return replace(tokens, decoder=[keep] * depth, cached=[keep] * depth, extra_pass=keep)


def _compare(compressed: CompressedKV, inputs: Mapping[str, Any]) -> None:
    """Refuse a prompt with other words before its image: it would be answered wrongly in silence."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    for row, words in enumerate(compressed.words):
        own = ids[row] if mask is None else ids[row][mask[row].bool()]
        if len(compressed.words) != len(ids) or own[: len(words)].tolist() != words:
            raise UserError(
                "this digest was made of other pictures, or behind other words; make one with attached.digest from "
                "prompts that begin alike, one for each row, or one for all"
            )
