"""Reference models that installed packages offer: a backbone, its questions, its training pictures and its plug-ins.

A package announces each of its references as an entry point of the group ``lit_reduce.references``; the library itself
knows none of them by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lit_reduce.errors import UserError

GROUP = "lit_reduce.references"


@dataclass(frozen=True)
class Reference:
    """One backbone that can be loaded by a short name, and what belongs to it.

    Attributes:
        name: What ``backbone=`` and ``data.name=`` take.
        folder: Returns the folder with the model's Hugging Face files; it may have to make them first.
        questions: Question sets by the name that ``data=`` takes: how many -> so many rows with answers.
        training: Training pictures with their questions: (split, pictures, questions on each) -> groups.
        plugins: Folder of the plug-ins that come with it: ``NAME/PLUGIN`` stands for one of them.
        plugin: The one of them that commands use where no reducer is named; "" for none.
        default: Whether commands use it where no backbone is named.
    """

    name: str
    folder: Callable[[], Path]
    questions: Mapping[str, Callable[[int], Iterable[Any]]] = field(default_factory=dict)
    training: Callable[[str, int, int], list[Any]] | None = None
    plugins: Path | None = None
    plugin: str = ""
    default: bool = False


@cache
def references() -> dict[str, Reference]:
    """All references of installed packages, by name.

    Raises:
        UserError: A package announces one that cannot be imported.
    """
    found: dict[str, Reference] = {}
    for entry in entry_points(group=GROUP):
        try:
            reference: Reference = entry.load()
        except Exception as error:  # a package of somebody else may raise anything
            raise UserError(
                f"the reference '{entry.name}' of an installed package cannot be imported: {error}; "
                "repair or remove that package"
            ) from error
        found[reference.name] = reference
    return dict(sorted(found.items()))


def default_reference() -> Reference | None:
    """The reference that commands use where none is named, if one is installed."""
    return next((reference for reference in references().values() if reference.default), None)


def question_sets() -> dict[str, Callable[[int], Iterable[Any]]]:
    """The question sets of all references, by name."""
    return {name: rows for reference in references().values() for name, rows in reference.questions.items()}


def plugin_folders() -> dict[str, Path]:
    """The plug-ins that come with the references, by the name ``REFERENCE/PLUGIN``."""
    return {
        f"{name}/{path.parent.name}": path.parent
        for name, reference in references().items()
        if reference.plugins is not None
        for path in sorted(reference.plugins.glob("*/reducer_config.json"))
    }
