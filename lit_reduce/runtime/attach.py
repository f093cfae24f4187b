"""Attaches reducers to a model object: ``with attach(model, reducer, keep=64): model.generate(**inputs)``.

Only ``generate`` and ``forward`` of this one object are replaced, by methods that keep their contracts, and hooks are
added where a reducer acts inside the tower or the language model. Class, weights and state dict stay as they are, and
`Attachment.detach` takes everything away again. An error while attaching leaves the model as it was.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import check_backbone, open_reducer
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import Keep
from lit_reduce.runtime.decoder.compressed_kv import CompressedKV
from lit_reduce.runtime.encode import Encoded
from lit_reduce.runtime.generate_wrapper import reduced_forward, reduced_generate
from lit_reduce.runtime.patches import ModelHooks, Patches
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.session import Session
from lit_reduce.runtime.site import Sites, Stats
from lit_reduce.tokens import Budget

_NAME = "_lit_reduce"
_METHODS = ("generate", "forward")
# Where generate keeps a compiled step: it was traced with our hooks, or without.
_COMPILED = ("_compiled_call", "_last_compile_config")


class Attachment(ModelHooks):
    """Reducers attached to a model; a context manager, or a plain object with `detach`.

    Attributes:
        model: The model that they are attached to.
        session: What they do.
        lock: Held by each call, for calls of several threads come one after the other.
    """

    def __init__(self, model: Any, sites: Sites, positions: str = "keep") -> None:
        """Check everything and change nothing; see `attach`."""
        super().__init__()
        if _NAME in vars(model):
            raise UserError("a reducer is attached to this model already; detach it first, or attach several at once")
        if not hasattr(type(model), "generate"):
            raise UserError(
                f"{type(model).__name__} has no method generate; attach to the transformers model itself, and compile "
                "or wrap it afterwards"
            )
        if any(module._compiled_call_impl is not None for module in model.modules()):
            raise UserError("this model was compiled in place and would not notice a reducer; compile it afterwards")
        self.model = model
        self.lock = _Lock()
        self.session = Session(model, sites, positions)
        self._before = {name: vars(model)[name] for name in _METHODS if name in vars(model)}

    def _patch(self, patches: Patches) -> None:
        patches.install(self.session)
        for name in _COMPILED:
            patches.pop(self.model, name)
        patches.set(self.model, _NAME, self)  # past nn.Module's registration, so that the state dict does not know
        for name, method in (("generate", _generate), ("forward", _forward)):
            # transformers reads signatures, so the wrapper must show the original one. A bound method follows deepcopy.
            patches.set(self.model, name, MethodType(_like(getattr(type(self.model), name), method), self.model))

    @property
    def sites(self) -> dict[str, tuple[Reducer, Budget]]:
        """The reducer and its budget at each site."""
        return self.session.sites

    @property
    def positions(self) -> str:
        """``keep`` or ``renumber``."""
        return self.session.positions

    @property
    def stats(self) -> Stats:
        """What the last call kept, and how long the reducers took."""
        return self.session.stats

    @property
    def prompt_map(self) -> PromptMap | None:
        """How the last call's prompt was shortened; None when it was left alone."""
        return self.session.prompt_map

    def digest(self, **inputs: Any) -> CompressedKV:
        """What learned tokens (kind ``register`` at the decoder) read of images, for many questions about them.

        ``generate(..., digest=...)`` and ``forward`` then run neither tower nor image; the prompts must begin with the
        same words and the same image. One digest of one image serves a batch of questions.

        Raises:
            UserError: no such reducer is attached, or not one image in each prompt.
        """
        with self.lock:
            return self.session.digest(inputs)

    def share(self, encoded: Encoded) -> None:
        """Use the images of the next prompt after tower and projector, so that they are not encoded again.

        Args:
            encoded: With every signal that the reducers declare (`encode`); it is not changed. Not for reducers inside
                the tower.
        """
        if not self.session.shares_encoding:
            raise ValueError(f"'{self.sites['encoder'][0].name}' acts inside the tower, so nothing can be shared")
        self.session.share(encoded)

    def encode(self, inputs: dict[str, Any]) -> Encoded:
        """What was shared, or one pass through tower and projector with the signals that the reducers declare."""
        return self.session.encode(inputs)

    def shorten(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], PromptMap]:
        """Encode, reduce and shorten one prompt."""
        return self.session.shorten(inputs)

    def detach(self) -> None:
        """Give the model its own methods back; harmless when repeated."""
        self.remove()

    def original(self, name: str) -> Any:
        """The method that stood there before, bound to the model."""
        return self._before.get(name) or getattr(type(self.model), name).__get__(self.model)

    @contextmanager
    def plain_forward(self) -> Iterator[None]:
        """The model's own ``forward`` for the time of one ``generate``: no detour at each step, nothing to compile."""
        mine = vars(self.model).pop("forward")
        if "forward" in self._before:
            vars(self.model)["forward"] = self._before["forward"]
        try:
            yield
        finally:
            vars(self.model)["forward"] = mine


Named = Reducer | str | Path


def attach(
    model: Any,
    reducer: Named | Sequence[Named],
    keep: Keep | Sequence[Keep] = 64,
    positions: str | None = None,
    revision: str | None = None,
) -> Attachment:
    """Attach a reducer to a model, or several at different sites.

    Args:
        model: A transformers vision-language model of a known family, or one with adapters (`peft.get_peft_model`).
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
    model = _within_adapters(model)
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
    return Attachment(model, sites, positions or "keep").install()


class _Lock:
    """A reentrant lock in a ``with`` block; a deep copy, which goes to another model, is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, _: Any) -> "_Lock":
        return _Lock()

    def __reduce__(self) -> Any:
        return _Lock, ()


def _within_adapters(model: Any) -> Any:
    """The transformers model inside a `peft.PeftModel`, which calls its ``generate`` and ``forward``.

    Raises:
        UserError: adapters that put tokens before the prompt.
    """
    if not callable(getattr(type(model), "get_base_model", None)):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("adapters that learn a prompt shift what the model counts; attach to a model without them")
    return model.get_base_model()


def _generate(attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    with attachment.lock, torch.no_grad(), attachment.plain_forward():
        return reduced_generate(attachment.session, attachment.original("generate"), *args, **kwargs)


def _forward(attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    with attachment.lock:
        return reduced_forward(attachment.session, attachment.original("forward"), *args, **kwargs)


def _like(original: Any, method: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(vars(self)[_NAME], *args, **kwargs)

    return torch.compiler.disable(wrapper)  # a compiler that reads through it would take it for the model's own
