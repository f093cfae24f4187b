"""What a reducer is, how its settings are typed, and the register that finds it by name."""

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.selectors import topk_sorted
from lit_reduce.ops.similarity import gather_tokens
from lit_reduce.tokens import Reduction, VisualTokens

KINDS = ("select", "resample", "register", "skip", "recall", "policy")
SITES = ("encoder", "projector", "decoder", "cache")
WARMUP_TARGETS = ("", "scores", "tokens", "layers", "keys")
ENTRY_POINTS = "lit_reduce.reducers"


@dataclass
class ReducerConfig:
    """Settings of a reducer: plain fields, each ``field(metadata={"help": ...})``; a method subclasses it.

    A field whose metadata has ``choices`` takes no other value.
    """

    @classmethod
    def from_options(cls, options: Mapping[str, Any], owner: str = "reducer") -> "ReducerConfig":
        """Build the settings from a mapping.

        Raises:
            UserError: an unknown option (the nearest right one is named), a value of the wrong type or not a choice.
        """
        hints = get_type_hints(cls)
        choices = {entry.name: entry.metadata.get("choices", ()) for entry in dataclasses.fields(cls)}
        known = list(choices)
        for key, value in options.items():
            if key not in known:
                raise UserError(f"{owner}: unknown option '{key}'; {_nearest(key, known)}")
            wanted = hints[key]
            allowed = (int, float) if wanted is float else wanted
            plain = wanted in (int, float, bool, str)
            if plain and (not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool)):
                raise UserError(f"{owner}: option '{key}' must be of type {wanted.__name__}, not {value!r}")
            if choices[key] and value not in choices[key]:
                raise UserError(f"{owner}: option '{key}' must be one of {', '.join(choices[key])}, not {value!r}")
        try:
            return cls(**options)
        except TypeError as error:  # a mandatory option is missing
            raise UserError(f"{owner}: {str(error).partition('() ')[2] or error}") from error


class Reducer(nn.Module):
    """Turns N visual tokens into K. A method sets the class attributes and writes `reduce`.

    Calls are deterministic: the same image and budget give the same reduction, whatever else is in the batch.

    Attributes:
        name: The name in the register, in plug-ins and on the command line.
        kind: One of `KINDS`, what it does.
        site: One of `SITES`, where it acts.
        signals: The inputs that it needs beside the features, see `VisualTokens.signals`. An instance may change kind,
            site, signals and warmup_target, where they follow from its settings.
        trained: Whether it has weights that distillation trains.
        warmup_target: What the warm-up trains from the teacher's attention: one of `WARMUP_TARGETS`, "" for nothing.
        adaptive_count: Whether, between decoder layers, another count may stay of each image: `stages` then gives what
            is meant to stay on average, and every stage is asked whatever an earlier one left.
        paper: The source, for lists and model cards.
        config_class: The dataclass of its settings.
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

    def forward(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Reduce every image to ``keep`` tokens; keeping all of them costs nothing and changes nothing.

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
        """Where an encoder, decoder or cache method acts: how many tokens of an image stay from before that layer on.

        Args:
            depth: Layers of the encoder or decoder.
            tokens: Visual tokens of the image where they enter it.
            keep: The image's budget.

        Returns:
            Counts by layer index, never rising; of kind ``skip``, or at the cache, each holds for its layer alone.
        """
        return {}

    def own_loss(self, name: str, rows: Tensor, count: int) -> Tensor:  # noqa: ARG002  (methods tell them apart)
        """A further loss of a training step, weighted, of what its reductions said under one name (`Reduction.losses`).

        Args:
            name: The name.
            rows: ``[R]``, of all images at all stages: a batch is reduced in as many calls as it has shapes.
            count: Images in the batch.
        """
        return rows.sum() / count

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The method itself, for ``1 <= keep < N`` and with every declared signal present."""
        raise NotImplementedError(f"{type(self).__name__} must define reduce")


class ScoringReducer(Reducer):
    """A reducer that gives each token a score and keeps the best; it writes only `score`.

    A part of the budget may go to tokens that summarise all that is dropped: then it says how many (`summary_count`)
    and makes them (`summary_tokens`). They take the places of the lowest scores.
    """

    warmup_target = "scores"

    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores ``[B, N]``, higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} must define score")

    def summary_count(self, keep: int) -> int:  # noqa: ARG002  (methods read it)
        """How many of ``keep`` tokens are not chosen, but stand for those that are dropped."""
        return 0

    def summary_tokens(self, tokens: VisualTokens, dropped: Tensor, count: int) -> Tensor:
        """Those tokens, ``[B, count, D]``, where ``dropped`` ``[B, N]`` bool says for whom."""
        raise NotImplementedError(f"{type(self).__name__} must define stand_in")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Keep the best scores in raster order; of equal scores the lower raster index wins."""
        scores, summary_count = self.score(tokens), self.summary_count(keep)
        kept = topk_sorted(scores, keep - summary_count)
        if not summary_count:
            return Reduction(kept, scores=scores)
        kept_indices, features = self.with_rest(tokens, scores, kept, kept, summary_count)
        kept_indices = kept_indices.sort(1).values
        return Reduction(kept_indices, features=gather_tokens(features, kept_indices), scores=scores)

    def with_rest(
        self, tokens: VisualTokens, scores: Tensor, kept: Tensor, entering: Tensor, summary_count: int
    ) -> tuple[Tensor, Tensor]:
        """Stand-ins added to what enters the model, which in training is more than what is kept.

        Args:
            tokens: All tokens.
            scores: ``[B, N]``.
            kept: ``[B, k]``, the best.
            entering: ``[B, M]``, whose places are taken; at most N - ``summary_count``.
            summary_count: Stand-ins of an image.

        Returns:
            ``entering`` and behind it the places of the stand-ins ``[B, M + spare]``, and all features ``[B, N, D]``,
            in which they stand there.
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
    """Class decorator: make a reducer findable by its ``name``.

    Raises:
        ValueError: no proper name, kind, site or settings, or the name is taken.
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
    """All reducers by name: those of this package and those that installed packages announce as entry points."""
    # Looked up by name, because the arrow of imports points the other way: a method imports this module.
    importlib.import_module("lit_reduce.reducers")
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _REGISTER or point.name in _FAILED:
            continue
        try:
            cls = register(point.load())
            if cls.name != point.name:
                raise ValueError(f"it calls itself '{cls.name}'")
        except Exception as error:  # noqa: BLE001  a broken third-party package must not take the others down
            _FAILED[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"reducer '{point.name}' of {point.value} does not load: {error}", stacklevel=2)
    return dict(sorted(_REGISTER.items()))


def find(name: str) -> type[Reducer]:
    """The reducer class of that name.

    Raises:
        UserError: no such reducer; the nearest name is given.
    """
    known = available()
    if name in _FAILED:
        raise UserError(f"the reducer '{name}' is announced but does not load: {_FAILED[name]}")
    if name not in known:
        raise UserError(f"unknown reducer '{name}'; {_nearest(name, known)}")
    return known[name]


def create(name: str, **options: Any) -> Reducer:
    """A fresh reducer by name, its settings given as keyword arguments.

    Raises:
        UserError: an unknown name or option.
    """
    cls = find(name)
    return cls(cls.config_class.from_options(options, owner=name))


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    listed = ", ".join(known) or "none"
    return f"did you mean '{near[0]}'? (known: {listed})" if near else f"known: {listed}"
