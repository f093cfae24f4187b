"""Reducers at work in one model: from the inputs of a prompt to what its language model reads and what that took."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lit_reduce.backbones.families import Family, family_of
from lit_reduce.errors import UserError
from lit_reduce.runtime.compact import shorten, unreduced
from lit_reduce.runtime.decoder.compressed_kv import CompressedKV
from lit_reduce.runtime.decoder.compressed_kv_site import CompressedKVSite
from lit_reduce.runtime.encode import Encoded, encode
from lit_reduce.runtime.handlers import handlers_for
from lit_reduce.runtime.patches import ModelHooks, Patches
from lit_reduce.runtime.positions import check_positions
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.site import Option, ShortPrompt, SiteHandler, Sites, Stats


class Session(ModelHooks):
    """The handlers of all sites of one model, called one after the other.

    ``with Session(model, sites).install() as session`` puts hooks into the model and takes them away again;
    ``generate`` and ``forward`` stay the model's own. Gradients are recorded wherever they are on.

    Attributes:
        model: The backbone.
        family: Its family.
        sites: The reducer and its budget at each site.
        positions: ``keep`` or ``renumber``.
        handlers: In the order in which an image meets their sites.
        stats: Of the last call.
        prompt_map: How the last call's prompt was shortened; None when it was left alone.
    """

    def __init__(self, model: Any, sites: Sites, positions: str = "keep", progress: float | None = None) -> None:
        """Check everything and change nothing.

        Args:
            model: A transformers vision-language model of a known family.
            sites: The reducer and its budget at each site.
            positions: ``keep`` the original position ids or ``renumber`` them.
            progress: Of training, from 0 to 1: a reducer between decoder layers may then gate tokens where inference
                drops them; None at inference.

        Raises:
            UserError: reducers, budgets or layers that cannot work here.
        """
        super().__init__()
        self.model, self.sites, self.positions = model, dict(sites), positions
        self.family: Family = family_of(model.config)
        check_positions(positions)
        self.handlers: list[SiteHandler] = handlers_for(model, sites, progress)
        for handler in self.handlers:
            handler.check(len(self.sites) == 1, positions)
        self.stats = Stats()
        self.prompt_map: PromptMap | None = None
        self._shared: Encoded | None = None

    def _patch(self, patches: Patches) -> None:
        for handler in self.handlers:
            handler.install(patches)

    @property
    def signals(self) -> frozenset[str]:
        """What one pass of the vision tower must give beside the features."""
        return frozenset[str]().union(*(handler.signals for handler in self.handlers))

    @property
    def shares_encoding(self) -> bool:
        """Whether the tower runs as in the plain model."""
        return all(handler.shares_encoding for handler in self.handlers)

    def keeps_all(self, counts: Sequence[int]) -> bool:
        """Whether nothing would be dropped, known from the images' counts alone: not even signals are computed."""
        if not counts or self.positions != "keep":
            return False
        return all(handler.keeps_all(count) for handler in self.handlers for count in set(counts))

    def share(self, encoded: Encoded) -> None:
        """Use these images for the next prompt instead of encoding them again."""
        self._shared = encoded

    def use_digest(self, digest: CompressedKV | None) -> None:
        """Use what `digest` returned for the next prompt; None to read the images again.

        Raises:
            UserError: no reducer is attached that takes it.
        """
        handler = self._compressing
        if digest is not None and handler is None:
            raise UserError("a digest is for reducers such as voco and the first turn of a conversation; leave it out")
        if handler is not None:
            handler.given = digest

    def digest(self, inputs: Mapping[str, Any]) -> CompressedKV:
        """What learned tokens (kind ``register`` at the decoder) read of the images of some prompts.

        Raises:
            UserError: no such reducer is attached, or not one image in each prompt.
        """
        if self._compressing is None:
            raise UserError(
                "a digest needs a reducer whose tokens read pictures inside the language model, such as voco"
            )
        return self._compressing.compress(inputs, self.encode(inputs))

    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """What is known of the images already, or one pass through tower and projector."""
        shared, self._shared = self._shared, None
        for handler in self.handlers:
            if (known := handler.encoded(inputs)) is not None:
                return known
        return shared or encode(self.model, inputs, self.signals, self.family)

    def shorten(self, inputs: Mapping[str, Any], encoded: Encoded | None = None) -> tuple[dict[str, Any], PromptMap]:
        """Encode, reduce and shorten one prompt.

        Args:
            inputs: Of the full prompt.
            encoded: Its images, if they are known.

        Returns:
            Inputs for the model's own ``generate`` or ``forward``, to be called within `reading`.
        """
        encoded = self.encode(inputs) if encoded is None else encoded
        images = unreduced(encoded)
        for handler in self.handlers:
            images = handler.reduce(inputs, encoded, images)
        short, prompt_map = shorten(self.model, inputs, encoded, images, self.positions)
        for handler in self.handlers:
            handler.schedule(ShortPrompt(inputs, short, prompt_map, encoded))
        self.record(sum(prompt_map.kept), sum(prompt_map.total), prompt_map)
        return short, prompt_map

    @contextmanager
    def reading(self, padded: bool = False, fresh: int = 0) -> Iterator[None]:
        """Within the ``with`` block the language model reads what was shortened last.

        Args:
            padded: Whether a column of padding was put before the prompt.
            fresh: Of a turn without new images, the tokens that the cache does not hold yet.
        """
        with ExitStack() as stack:
            for handler in self.handlers:
                stack.enter_context(handler.reading(padded, fresh))
            yield
            for handler in self.handlers:
                self.stats, self.prompt_map = handler.record(self.stats, self.prompt_map)

    def refuse(self, option: Option) -> None:
        """Refuse ways of generating that would give other answers than the plain model, before anything runs.

        Args:
            option: The value of a generation option by its name, None where it is not set.

        Raises:
            UserError: one of them is asked for.
        """
        if option("prefill_chunk_size") and self.family.looks_ahead:
            raise UserError(
                f"tokens of '{self.family.name}' see some that come behind them, and chunks of the prompt hide these; "
                "leave out prefill_chunk_size"
            )
        for handler in self.handlers:
            handler.refuse(option)

    def refuse_behind_cache(self) -> None:
        """Refuse a new image behind a cache, where that cannot be right.

        Raises:
            UserError: it cannot.
        """
        for handler in self.handlers:
            handler.refuse_behind_cache()
        if self.family.looks_ahead:
            raise UserError(
                f"a new image cannot follow a cache of '{self.family.name}', whose images are read in both directions; "
                "pass the whole conversation with all its images and no cache"
            )

    def record(self, kept: int, total: int, prompt_map: PromptMap | None = None) -> None:
        """Start the statistics of a call with what happened before the language model; what was shared is used up."""
        self.prompt_map, self._shared = prompt_map, None
        self.stats = Stats(kept, total, 0.0 if prompt_map is None else prompt_map.reducer_ms)

    @property
    def _compressing(self) -> CompressedKVSite | None:
        return next((handler for handler in self.handlers if isinstance(handler, CompressedKVSite)), None)
