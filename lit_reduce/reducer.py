"""Base classes of reducers, their settings, and the register that finds them by name."""

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.selectors import topk_sorted
from lit_reduce.ops.similarity import gather_tokens
from lit_reduce.options import check, check_value, former_names, is_of_type
from lit_reduce.tokens import Reduction, VisualTokens

KINDS = ("select", "resample", "register", "skip", "recall", "policy")
SITES = ("encoder", "projector", "decoder", "cache")
WARMUP_TARGETS = ("", "scores", "tokens", "layers", "keys")
ENTRY_POINTS = "lit_reduce.reducers"


@dataclass
class ReducerConfig:
    """Settings of a reducer; a method subclasses it and declares each as `lit_reduce.options.option`."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any], owner: str = "reducer") -> "ReducerConfig":
        """Build the settings from a mapping.

        Raises:
            UserError: an option that `check_options` refuses, or a mandatory one that is missing.
        """
        cls.check_options(options, owner)
        try:
            config = cls(**options)
        except TypeError as error:  # a mandatory option is missing
            raise UserError(f"{owner}: {str(error).partition('() ')[2] or error}") from error
        check(config, owner)
        return config

    @classmethod
    def check_options(cls, options: Mapping[str, Any], owner: str = "reducer") -> None:
        """Refuse options that the settings do not have.

        Raises:
            UserError: a former name, an unknown one (the nearest right one is named), a value of the wrong type or out
                of its limits.
        """
        hints, former = get_type_hints(cls), former_names(cls)
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        for key, value in options.items():
            if key in former and key not in fields:
                raise UserError(f"{owner}: option '{key}' is now called '{former[key]}': write that")
            if key not in fields:
                raise UserError(f"{owner}: unknown option '{key}'; {_nearest(key, list(fields))}")
            if not is_of_type(value, hints[key]):
                kind = hints[key].__name__ if isinstance(hints[key], type) and not get_args(hints[key]) else hints[key]
                raise UserError(f"{owner}: option '{key}' must be of type {kind}, not {value!r}")
            check_value(fields[key].metadata, key, value, owner)


class Reducer(nn.Module):
    """Base class of all methods: turns N visual tokens into K.

    A subclass sets the class attributes and defines `reduce`.

    Calls are deterministic: an image and a budget give the same reduction, whatever else is in the batch.

    Attributes:
        name: Name in the register, in plug-ins and on the command line.
        kind: One of `KINDS`, the type of the reduction.
        site: One of `SITES`, the place in the model where it acts.
        signals: Names of the inputs that it needs beside the features, see `VisualTokens.signals`. An instance may
            override kind, site, signals and warmup_target, if they depend on its settings.
        trained: Whether it has weights that distillation trains.
        warmup_target: Target of the warm-up that trains on the teacher's attention: one of `WARMUP_TARGETS`, "" for
            none.
        adaptive_count: Whether the number of tokens between decoder layers may differ per image: `stages` then gives
            the intended means, and every stage is called regardless of how many tokens earlier stages left.
        paper: Source, for lists and model cards.
        config_class: Dataclass of its settings.
        smallest: Settings of a small instance, which the shared tests run, with the widths and depths of their models.
            Every trained reducer has one.
    """

    name: ClassVar[str]
    kind: str = "select"
    site: str = "projector"
    signals: frozenset[str] = frozenset()
    trained: ClassVar[bool] = False
    warmup_target: str = ""
    adaptive_count: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    config_class: ClassVar[type[ReducerConfig]] = ReducerConfig
    smallest: ClassVar[ReducerConfig | None] = None

    def __init__(self, config: ReducerConfig | None = None) -> None:
        super().__init__()
        self.config: Any = self.config_class() if config is None else config
        check(self.config, getattr(self, "name", type(self).__name__))

    def forward(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Reduce every image to ``keep`` tokens; keeping all of them is the identity and calls nothing.

        Raises:
            UserError: ``keep`` is out of range, or a signal is missing.
        """
        batch, count = tokens.features.shape[:2]
        if not 1 <= keep <= count:
            raise UserError(f"keep={keep}: an image has {count} visual tokens here; give 1 to {count}")
        if keep == count:
            return Reduction(torch.arange(count, device=tokens.features.device).expand(batch, -1))
        for name in sorted(self.signals):
            tokens.signal(name)
        return self.reduce(tokens, keep)

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002  (methods read them)
        """Token counts by layer of a method that acts in the encoder, the decoder or the cache.

        Args:
            depth: Layers of the encoder or decoder.
            tokens: Visual tokens of the image that enter it.
            keep: Budget of the image.

        Returns:
            ``{layer: tokens that remain from before this layer on}``, never increasing; of kind ``skip``, or in the
            cache, each count holds for its layer alone.
        """
        return {}

    def own_loss(self, name: str, rows: Tensor, count: int) -> Tensor:  # noqa: ARG002  (methods tell them apart)
        """Additional loss of a training step, weighted, from the terms of one name in `Reduction.losses`.

        Args:
            name: Name of the term.
            rows: ``[R]``, of all images at all stages; a batch is reduced in one call for each shape of image.
            count: Images in the batch.
        """
        return rows.sum() / count

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The method itself, for ``1 <= keep < N`` and with every declared signal present."""
        raise NotImplementedError(f"{type(self).__name__} must define reduce")


class ScoringReducer(Reducer):
    """Base class of reducers that score each token and keep the best; a subclass defines `score`.

    Part of the budget may go to summary tokens, which represent the dropped ones: a subclass then defines their number
    (`summary_count`) and computes them (`summary_tokens`). They take the positions of the tokens with the lowest
    scores.
    """

    warmup_target = "scores"

    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores ``[B, N]``, higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} must define score")

    def summary_count(self, keep: int) -> int:  # noqa: ARG002  (methods read it)
        """Number of summary tokens among ``keep`` tokens."""
        return 0

    def summary_tokens(self, tokens: VisualTokens, dropped: Tensor, count: int) -> Tensor:
        """Summary tokens ``[B, count, D]`` of the tokens in ``dropped`` ``[B, N]`` bool."""
        raise NotImplementedError(f"{type(self).__name__} must define summary_tokens")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Keep the highest scores in raster order; of equal scores the lower index wins."""
        scores, summary_count = self.score(tokens), self.summary_count(keep)
        kept = topk_sorted(scores, keep - summary_count)
        if not summary_count:
            return Reduction(kept, scores=scores)
        kept_indices, features = self.with_summary(tokens, scores, kept, kept, summary_count)
        kept_indices = kept_indices.sort(1).values
        return Reduction(kept_indices, features=gather_tokens(features, kept_indices), scores=scores)

    def with_summary(
        self, tokens: VisualTokens, scores: Tensor, kept: Tensor, entering: Tensor, summary_count: int
    ) -> tuple[Tensor, Tensor]:
        """Add summary tokens to the tokens that enter the model (in training these are more than the kept ones).

        Args:
            tokens: All tokens.
            scores: ``[B, N]``.
            kept: ``[B, k]``, indices of the highest scores.
            entering: ``[B, M]``, indices of the tokens that enter the model, at most N - ``summary_count``.
            summary_count: Number of summary tokens per image, S.

        Returns:
            ``entering`` followed by the positions of the summary tokens ``[B, M + S]``, and the features ``[B, N, D]``
            with the summary tokens written at these positions.
        """
        dropped = torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
        taken = torch.zeros_like(dropped).scatter(1, entering, True)
        places = topk_sorted((-scores.detach()).masked_fill(taken, -torch.inf), summary_count)
        made = self.summary_tokens(tokens, dropped, summary_count).to(tokens.features)
        index = places[..., None].expand_as(made)
        return torch.cat([entering, places], 1), tokens.features.scatter(1, index, made)


_REGISTER: dict[str, type[Reducer]] = {}
_FAILED: dict[str, str] = {}
_R = TypeVar("_R", bound=type[Reducer])


def register(cls: _R) -> _R:
    """Class decorator that registers a reducer under its ``name``.

    Raises:
        ValueError: An invalid name, kind, site or settings class, or a name that is already registered.
    """
    name = getattr(cls, "name", "")
    if not name or name != name.lower() or not name.replace("_", "").isalnum():
        raise ValueError(f"{cls.__qualname__}.name must be lower-case letters, digits and _, not {name!r}")
    if cls.kind not in KINDS or cls.site not in SITES:
        raise ValueError(f"{name}: kind must be one of {KINDS} and site one of {SITES}, not {cls.kind}, {cls.site}")
    if cls.warmup_target not in WARMUP_TARGETS:
        raise ValueError(f"{name}: warmup_target must be one of {WARMUP_TARGETS}, not {cls.warmup_target!r}")
    if not dataclasses.is_dataclass(cls.config_class):
        raise ValueError(f"{name}: config_class must be a dataclass")
    taken = _REGISTER.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the reducer name '{name}' is taken by {taken.__module__}.{taken.__qualname__}")
    _REGISTER[name] = cls
    return cls


def available() -> dict[str, type[Reducer]]:
    """All registered reducers by name, including those that installed packages announce as entry points."""
    # Imported by name, because methods import this module.
    importlib.import_module("lit_reduce.reducers")
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _REGISTER or point.name in _FAILED:
            continue
        try:
            cls = register(point.load())
            if cls.name != point.name:
                raise ValueError(f"it calls itself '{cls.name}'")
        except Exception as error:  # noqa: BLE001  a broken third-party package must not break the others
            _FAILED[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"reducer '{point.name}' of {point.value} does not load: {error}", stacklevel=2)
    return dict(sorted(_REGISTER.items()))


def find(name: str) -> type[Reducer]:
    """The reducer class of a name.

    Raises:
        UserError: No such reducer; the error names the nearest one.
    """
    known = available()
    if name in _FAILED:
        raise UserError(f"the reducer '{name}' is announced but does not load: {_FAILED[name]}")
    if name not in known:
        raise UserError(f"unknown reducer '{name}'; {_nearest(name, known)}")
    return known[name]


def create(name: str, **options: Any) -> Reducer:
    """Create a reducer by name, with its settings as keyword arguments.

    Raises:
        UserError: An unknown name or option.
    """
    cls = find(name)
    return cls(cls.config_class.from_options(options, owner=name))


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    listed = ", ".join(known) or "none"
    return f"did you mean '{near[0]}'? (known: {listed})" if near else f"known: {listed}"
