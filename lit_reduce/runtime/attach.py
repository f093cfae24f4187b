"""Puts reducers into a model object: ``with attach(model, reducer, keep=64): model.generate(**inputs)``.

Only ``generate`` and ``forward`` of this one object are replaced, by methods that keep their contracts, and hooks are
added where a reducer acts inside the tower or the language model. Class, weights and state dict stay as they are, and
`Attachment.detach` takes everything away again.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from lit_reduce.backbones.families import family_of
from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import check_backbone, open_reducer
from lit_reduce.recall import RecallReducer
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import Keep, PromptMap, compact
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.runtime.decoder.compressed_kv import CompressedKV, CompressedKVReader
from lit_reduce.runtime.decoder.hooks import DecoderHooks, Recall, stages_of
from lit_reduce.runtime.decoder.prefill_state import Prompt
from lit_reduce.runtime.decoder.schedule import acts, schedule_prompt
from lit_reduce.runtime.encode import Encoded, encode
from lit_reduce.runtime.generate_wrapper import reduced_forward, reduced_generate
from lit_reduce.runtime.recall.hooks import ImageMemory, RecallHooks
from lit_reduce.runtime.vision import batched as tower
from lit_reduce.tokens import Budget

_NAME = "_lit_reduce"
_METHODS = {"generate": reduced_generate, "forward": reduced_forward}
_COMPILED = (
    "_compiled_call",
    "_last_compile_config",
)  # where generate keeps a compiled step: it knows our hooks, or not
INSIDE = ("decoder", "cache")


@dataclass(frozen=True)
class Stats:
    """The last call.

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


class Attachment:
    """Reducers inside a model; a context manager, or a plain object with `detach`.

    Attributes:
        model: The model that they are attached to.
        sites: The reducer and its budget at each site.
        positions: ``keep`` or ``renumber``.
        stats: What the last call kept, and how long the reducers took.
        logical: How the last call's prompt was shortened; None when it was left alone.
    """

    def __init__(self, model: Any, sites: dict[str, tuple[Reducer, Budget]], positions: str = "keep") -> None:
        if _NAME in vars(model):
            raise UserError("a reducer is attached to this model already; detach it first, or attach several at once")
        self.model, self.sites, self.positions = model, sites, positions
        self.family = family_of(model.config)
        self._check()
        self.stats = Stats()
        self.logical: PromptMap | None = None
        self._encoded: Encoded | None = None
        self._prompt: Prompt | None = None
        self._bank: ImageMemory | None = None
        self._undo: list[Callable[[], None]] = []
        if "encoder" in sites:  # first, because it may refuse the tower
            self._undo.append(tower.install(model, self.family, *sites["encoder"]).remove)
        reading = [site for site, (reducer, _) in sites.items() if site == "decoder" and reducer.kind == "register"]
        self.digesting = CompressedKVReader(model, *sites[reading[0]]) if reading else None
        acting = {site: reducer for site, (reducer, _) in sites.items() if site in INSIDE and site not in reading}
        self.inside = DecoderHooks(model, **acting) if acting else None
        if self.inside is not None:
            self._undo.append(self.inside.remove)
        looking = sites["projector"][0] if "projector" in sites else None
        self.recalling = RecallHooks(model, looking) if isinstance(looking, RecallReducer) else None
        if self.recalling is not None:
            self._undo.append(self.recalling.remove)
        self._before = {name: vars(model)[name] for name in _METHODS if name in vars(model)}
        self._compiled = {name: vars(model).pop(name) for name in _COMPILED if name in vars(model)}
        vars(model)[_NAME] = self  # past nn.Module's registration, so that the state dict does not know
        for name, method in _METHODS.items():
            # transformers reads signatures, so the wrapper must show the original one. A bound method follows deepcopy.
            vars(model)[name] = MethodType(_like(getattr(type(model), name), method), model)

    def _check(self) -> None:
        """Complain now, not in the middle of an evaluation."""
        tokens, depth = self.family.tokens(self.model.config), len(self.model.get_decoder().layers)
        for site, (reducer, keep) in self.sites.items():
            if isinstance(reducer, RecallReducer) and (len(self.sites) > 1 or self.positions != "keep"):
                raise UserError(
                    f"'{reducer.name}' looks back at the whole picture in its original places; attach it alone, and "
                    "leave positions=keep"
                )
            if site == "decoder" and reducer.kind == "register" and len(self.sites) > 1:
                raise UserError(f"the tokens of '{reducer.name}' read the whole picture; attach it alone")
            if site in INSIDE:
                kernel = self.model.get_decoder().config._attn_implementation
                if "flex" in (kernel or "") or "paged" in (kernel or ""):
                    raise UserError(f"the attention kernel '{kernel}' cannot work on some of the tokens; use sdpa")
                # Where the count depends on the image, any large one tells whether the layers exist.
                some = tokens or 1024 * (keep.value if isinstance(keep.value, int) else 1)
                stages_of(reducer, depth, some, keep.count(some))
                from_tower(reducer)
            if tokens and site != "encoder":
                keep.count(tokens)

    def recall(self, layer: int, entries: Recall) -> None:
        """Let a decoder layer see keys and values beside its own.

        Args:
            layer: Index of the layer.
            entries: Called once for each prompt (without a cache, each pass), with the `PrefillState`; gives `Extra`.
        """
        if self.inside is None:
            self.inside = DecoderHooks(self.model)
            self._undo.append(self.inside.remove)
        self.inside.recall[layer] = entries

    def digest(self, **inputs: Any) -> CompressedKV:
        """What learned tokens (kind ``register`` at the decoder) make of pictures, for many questions about them.

        ``generate(..., digest=...)`` and ``forward`` then read neither picture nor tower; the prompts must begin with
        the same words and the same picture. One digest of one picture serves a batch of questions.

        Raises:
            UserError: no such reducer is attached, or not one picture in each prompt.
        """
        if self.digesting is None:
            raise UserError(
                "a digest needs a reducer whose tokens read pictures inside the language model, such as voco"
            )
        return self.digesting.digest(inputs, self.encode)

    def share(self, encoded: Encoded) -> None:
        """The pictures of the next prompt after tower and projector, when they are known: they are not encoded again.

        Args:
            encoded: With every signal that the reducers declare (`encode`); it is not changed. Not for reducers inside
                the tower.
        """
        if "encoder" in self.sites:
            raise ValueError(f"'{self.sites['encoder'][0].name}' acts inside the tower, so nothing can be shared")
        self._encoded = encoded

    def encode(self, inputs: dict[str, Any], signals: Iterable[str] = ()) -> Encoded:
        """What was shared, or one pass through tower and projector."""
        shared, self._encoded = self._encoded, None
        return shared or encode(self.model, inputs, signals, self.family)

    def original(self, name: str) -> Any:
        """The method that stood there before, bound to the model."""
        return self._before.get(name) or getattr(type(self.model), name).__get__(self.model)

    @contextmanager
    def plain_forward(self) -> Iterator[None]:
        """The model's own ``forward``, for the time of one ``generate``: no detour at each step, nothing to compile."""
        mine = vars(self.model).pop("forward")
        if "forward" in self._before:
            vars(self.model)["forward"] = self._before["forward"]
        try:
            yield
        finally:
            vars(self.model)["forward"] = mine

    def shorten(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], PromptMap]:
        """Encode, reduce and shorten one prompt."""
        if self.digesting is not None:
            short, logical = self.digesting.shorten(inputs, self.positions, self.encode)
            self.record(sum(logical.kept), sum(logical.total), logical)
            return short, logical
        inside = [reducer for site, (reducer, _) in self.sites.items() if site in INSIDE]
        signals = frozenset[str]().union(*map(from_tower, inside))
        reducer, keep = self.sites.get("projector", (_ALL, Budget(1.0)))
        encoded = self.encode(inputs, signals | reducer.signals)
        short, logical = compact(self.model, inputs, encoded, reducer, keep, self.positions)
        if self.inside is not None:
            sites = {site: self.sites[site] for site in INSIDE if site in self.sites}
            prompt = schedule_prompt(self.model, short, logical, encoded, sites)
            self._prompt = prompt if self.inside.recall or acts(prompt) else None
        self._bank = None if self.recalling is None else ImageMemory.of(self.model, reducer, inputs, short, logical)
        self.record(sum(logical.kept), sum(logical.total), logical)
        return short, logical

    def reading(self, padded: bool = False, fresh: int = 0) -> AbstractContextManager[None]:
        """While it lasts, the language model reads what was shortened last, perhaps with a padding token before it.

        Args:
            padded: Whether there is one.
            fresh: Of a turn without new images, the tokens that the cache does not hold yet.
        """
        if self.digesting is not None:
            return self.digesting.reading(padded)
        prompt, self._prompt = self._prompt, None
        bank, self._bank = self._bank, None
        if self.recalling is not None:
            return self.recalling.reading(bank.moved(1) if bank is not None and padded else bank, fresh)
        prompt = prompt.behind_padding() if prompt is not None and padded else prompt
        return nullcontext() if self.inside is None else self.inside.reading(prompt)

    def keeps_all(self, counts: Sequence[int]) -> bool:
        """Whether nothing would be dropped, known from the images' counts alone: not even the signals are computed."""
        if not counts or self.positions != "keep" or (self.inside and self.inside.recall):
            return False
        depth = len(self.model.get_decoder().layers)
        for site, (reducer, keep) in self.sites.items():
            if site == "encoder":  # it counts the tower's tokens
                return False
            for count in set(counts):
                budget = keep.count(count)
                left = stages_of(reducer, depth, count, budget).values() if site in INSIDE else [budget]
                if any(x < count for x in left):
                    return False
        return True

    def record(self, kept: int, total: int, logical: PromptMap | None = None) -> None:
        """Remember what a call did before the language model."""
        self.logical = logical
        self.stats = Stats(kept, total, 0.0 if logical is None else logical.reducer_ms)

    def record_inside(self) -> None:
        """Remember what the call did inside the language model as well."""
        inside, logical = self.inside, self.logical
        if self.recalling is not None:
            self.stats = replace(self.stats, reducer_ms=self.stats.reducer_ms + self.recalling.spent)
        if inside is None or logical is None or not inside.counts or not logical.kept:
            return
        many = len(inside.pictures) // len(logical.kept)  # beams and repeated samples count once
        left = [p for p in inside.pictures if p.row % many == 0]
        mine = [i for i, p in enumerate(inside.pictures) if p.row % many == 0]
        counts = [[count[i] for i in mine] for count in inside.counts]
        mean = [sum(one) / len(one) for one in zip(*counts, strict=True)] if "decoder" in self.sites else []
        kept_indices = [before[p.kept_indices] for before, p in zip(logical.kept_indices, left, strict=True)]
        spent, kept = logical.reducer_ms + inside.spent, [p.count for p in left]
        self.logical = replace(logical, kept_indices=kept_indices, kept=kept, reducer_ms=spent, layers=mean)
        layers, cached = tuple(map(sum, counts)), tuple(count // many for count in inside.cached)
        self.stats = Stats(sum(kept), self.stats.total, spent, layers, cached)

    def detach(self) -> None:
        """Give the model its own methods back; harmless when repeated."""
        if vars(self.model).get(_NAME) is self:
            for name in (_NAME, *_METHODS, *_COMPILED):
                vars(self.model).pop(name, None)
            vars(self.model).update(self._before | self._compiled)
            for undo in reversed(self._undo):
                undo()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


Named = Reducer | str | Path


def attach(
    model: Any,
    reducer: Named | Sequence[Named],
    keep: Keep | Sequence[Keep] = 64,
    positions: str | None = None,
    revision: str | None = None,
) -> Attachment:
    """Put a reducer into a model, or several at different sites.

    Args:
        model: A transformers vision-language model of a known family.
        reducer: A reducer, the folder or hub id of a plug-in, or the name of a reducer that needs no training; or a
            list of these, at most one for each site.
        keep: Visual tokens to keep of each image: a count, or a ratio in (0, 1]; or one for each reducer.
        positions: ``keep`` the original position ids or ``renumber`` them; by default what the plug-in says.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A context manager that detaches at its end; `Attachment.detach` does the same.

    Raises:
        UserError: an unknown reducer, a plug-in of another backbone, a budget out of range, two reducers at one site, a
            reducer whose layers this model lacks, or a second attachment.
    """
    named: list[Any] = list(reducer) if isinstance(reducer, list | tuple) else [reducer]
    keeps: list[Any] = list(keep) if isinstance(keep, list | tuple) else [keep] * len(named)
    if len(keeps) != len(named) or not named:
        raise UserError(f"{len(named)} reducers but {len(keeps)} budgets; give one keep for all or one for each")
    sites: dict[str, tuple[Reducer, Budget]] = {}
    for name, budget in zip(named, keeps, strict=True):
        found, plugin = open_reducer(name, revision=revision)
        if plugin is not None:
            check_backbone(plugin, identify(model))
        if found.site in sites:
            other = sites[found.site][0].name
            raise UserError(
                f"'{other}' and '{found.name}' both act at the {found.site}; attach one reducer for each site"
            )
        sites[found.site] = found, Budget.parse(budget)
        positions = positions or (plugin.positions if plugin is not None and found.site == "projector" else None)
    return Attachment(model, sites, positions or "keep")


class _All(Reducer):
    """Stands at the projector when nobody reduces there."""

    name = "all"


_ALL = _All()


def _like(original: Any, method: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(vars(self)[_NAME], *args, **kwargs)

    return torch.compiler.disable(wrapper)  # a compiler that reads through it would take it for the model's own
