"""Attributes and hooks that are put into a model and can all be taken away again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

from torch import nn


class Patches:
    """Changes to modules that are undone together, the last one first.

    Every undo is noted before its change is made and does nothing where that was not made, so an exception between any
    two steps, KeyboardInterrupt included, leaves the modules as they were. A deep copy undoes the changes of the copied
    modules, which closures in a `contextlib.ExitStack` would not.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, module: Any, name: str, value: Any) -> None:
        """Set an attribute in the module's ``__dict__``, past the registration of `torch.nn.Module`."""
        self._note(module, name)
        vars(module)[name] = value

    def pop(self, module: Any, name: str) -> None:
        """Take an attribute out of the module's ``__dict__`` if it is there; what is set later is undone as well."""
        self._note(module, name)
        vars(module).pop(name, None)

    def replace_forward(self, module: nn.Module, method: Callable[..., Any]) -> None:
        """Replace ``forward`` by ``method``, which gets the present one as its first argument."""
        self.set(module, "forward", partial(method, module.forward))

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> None:
        """`torch.nn.Module.register_forward_pre_hook`."""
        self._undo.append(partial(_remove_hook, module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`torch.nn.Module.register_forward_hook`."""
        self._undo.append(partial(_remove_hook, module, hook))
        module.register_forward_hook(hook)

    def install(self, hooks: "ModelHooks") -> None:
        """Install other hooks, and remove them when these changes are undone."""
        self._undo.append(hooks.remove)
        hooks.install()

    def undo(self) -> None:
        """Undo all changes; harmless when repeated."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _note(self, module: Any, name: str) -> None:
        before = [vars(module)[name]] if name in vars(module) else []
        self._undo.append(partial(_restore, module, name, before))


class ModelHooks:
    """Base class of what changes a model from `install` until `remove`, or within a ``with`` block."""

    def __init__(self) -> None:
        self._patches = Patches()

    def install(self) -> Self:
        """Change the model; an exception on the way leaves it as it was."""
        try:
            self._patch(self._patches)
            return self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Undo all changes; harmless when repeated."""
        self._patches.undo()

    def _patch(self, patches: Patches) -> None:
        """Make the changes."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _restore(module: Any, name: str, before: list[Any]) -> None:
    """Give an attribute its former value, or take it away where ``before`` is empty."""
    if before:
        vars(module)[name] = before[0]
    else:
        vars(module).pop(name, None)


def _remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook by its identity: a handle would not exist yet if registration was interrupted."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
