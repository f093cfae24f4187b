"""Puts a reducer into a model object: ``with attach(model, reducer, keep=64): model.generate(**inputs)``.

Only ``generate`` and ``forward`` of this one object are replaced, by methods that keep their contracts; class, weights,
state dict and hooks stay as they are, and `Attachment.detach` takes the two away again.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from lit_reduce.backbones.families import family_of
from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import load_plugin
from lit_reduce.reducer import Reducer, available, create
from lit_reduce.runtime.compact import Keep, Logical, compact
from lit_reduce.runtime.contract import reduced_forward, reduced_generate
from lit_reduce.runtime.encode import encode
from lit_reduce.tokens import Budget

_NAME = "_lit_reduce"
_METHODS = {"generate": reduced_generate, "forward": reduced_forward}


@dataclass(frozen=True)
class Stats:
    """The last call: visual tokens kept and before, over all images, and the reducer's own time in milliseconds."""

    kept: int = 0
    total: int = 0
    reducer_ms: float = 0.0


class Attachment:
    """A reducer inside a model; a context manager, or a plain object with `detach`.

    Attributes:
        model: The model that it is attached to.
        reducer: The reducer.
        keep: The budget of each image.
        positions: ``keep`` or ``renumber``.
        stats: What the last call kept, and how long the reducer took.
        logical: How the last call's prompt was shortened; None when it was left alone.
    """

    def __init__(self, model: Any, reducer: Reducer, keep: Budget, positions: str) -> None:
        if _NAME in vars(model):
            raise UserError("a reducer is attached to this model already; detach it first")
        self.model, self.reducer, self.keep, self.positions = model, reducer, keep, positions
        self.family = family_of(model.config)
        self.keep.count(self.family.tokens(model.config))  # complains now, not in the middle of an evaluation
        self.stats = Stats()
        self.logical: Logical | None = None
        self._before = {name: vars(model)[name] for name in _METHODS if name in vars(model)}
        vars(model)[_NAME] = self  # past nn.Module's registration, so that the state dict does not know
        for name, method in _METHODS.items():
            # transformers reads signatures, so the wrapper must show the original one. A bound method follows deepcopy.
            vars(model)[name] = MethodType(_like(getattr(type(model), name), method), model)

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

    def shorten(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Logical]:
        """Encode, reduce and shorten one prompt."""
        encoded = encode(self.model, inputs, self.reducer.signals, self.family)
        short, logical = compact(self.model, inputs, encoded, self.reducer, self.keep, self.positions)
        self.record(sum(logical.kept), sum(logical.total), logical)
        return short, logical

    def keeps_all(self, images: int, tokens: int) -> bool:
        """Whether nothing would be dropped, known from counts alone, so that not even the signals are computed."""
        equal = images > 0 and tokens % images == 0
        return equal and self.positions == "keep" and self.keep.count(tokens // images) == tokens // images

    def record(self, kept: int, total: int, logical: Logical | None = None) -> None:
        """Remember what a call did."""
        self.logical = logical
        self.stats = Stats(kept, total, 0.0 if logical is None else logical.reducer_ms)

    def detach(self) -> None:
        """Give the model its own methods back; harmless when repeated."""
        if vars(self.model).get(_NAME) is self:
            for name in (_NAME, *_METHODS):
                del vars(self.model)[name]
            vars(self.model).update(self._before)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    model: Any,
    reducer: Reducer | str | Path,
    keep: Keep = 64,
    positions: str | None = None,
    revision: str | None = None,
) -> Attachment:
    """Put a reducer into a model.

    Args:
        model: A transformers vision-language model of a known family.
        reducer: A reducer, the folder or hub id of a plug-in, or the name of a reducer that needs no training.
        keep: Visual tokens to keep of each image: a count, or a ratio in (0, 1].
        positions: ``keep`` the original position ids or ``renumber`` them; by default what the plug-in says.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A context manager that detaches at its end; `Attachment.detach` does the same.

    Raises:
        UserError: an unknown reducer, a plug-in of another backbone, a budget out of range, or a second attachment.
    """
    found, stored = find_reducer(reducer, model, revision)
    return Attachment(model, found, Budget.parse(keep), positions or stored)


def find_reducer(reducer: Reducer | str | Path, model: Any, revision: str | None = None) -> tuple[Reducer, str]:
    """The reducer that a user named, and the treatment of positions that it was made for.

    Raises:
        UserError: not found, made for another backbone, or a name whose weights must come from a plug-in.
    """
    if isinstance(reducer, Reducer):
        return reducer, "keep"
    name = str(reducer)
    if Path(name).is_dir() or "/" in name or isinstance(reducer, Path):
        loaded, config = load_plugin(name, revision=revision, backbone=identify(model))
        return loaded.eval(), config.positions
    known = available().get(name)
    if known is not None and known.trained:
        raise UserError(f"the reducer '{name}' is a trained one; give the folder or hub id of a plug-in")
    return create(name).eval(), "keep"


def _like(original: Any, method: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(vars(self)[_NAME], *args, **kwargs)

    return wrapper
