"""The reducers of a comparison, found by the entries of a list in the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from lit_reduce.errors import UserError
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.reducer import available
from lit_reduce.settings import ReducerSettings


def find_specs(entries: Sequence[Any], keep: int | float) -> tuple[dict[str, ReducerSpec], dict[str, str]]:
    """Find the reducers that the user listed.

    Args:
        entries: Names, folders and hub ids; ``all`` for every reducer that needs no training; or mappings with
            ``name``, ``options`` and ``revision``.
        keep: Any of the budgets.

    Returns:
        Their specs, and the reasons why plug-ins do not load, both by the name for the report.

    Raises:
        UserError: No entry, an unknown name, unknown options, or the same reducer twice.
    """
    wanted = list(chain.from_iterable(_reducers(entry) for entry in entries))
    if not wanted:
        raise UserError("reducers=[] names none: give names of lit-reduce list, folders of plug-ins, or all")
    specs: dict[str, ReducerSpec] = {}
    broken: dict[str, str] = {}
    for settings in wanted:
        word = "/" not in settings.name and not Path(settings.name).exists()
        try:
            spec = find_spec(settings, keep)
        except UserError as error:
            if word or settings.name in available():  # a slip of the keyboard, not a failure: say so now
                raise
            broken[settings.name] = str(error)
            continue
        if spec.reducer is None:
            raise UserError("reducers holds none, but all tokens are always compared: leave it out")
        options = ", ".join(f"{key}={value}" for key, value in settings.options.items())
        short = f"{spec.reducer.name} ({options})" if options else spec.reducer.name
        label = short if short not in specs else settings.name
        if label in specs:
            raise UserError(f"reducers names {label} twice: leave one out")
        specs[label] = spec
    return specs, broken


def _reducers(entry: Any) -> list[ReducerSettings]:
    if entry == "all":
        return [ReducerSettings(name) for name, cls in available().items() if not cls.trained]
    if isinstance(entry, str):
        return [ReducerSettings(entry)]
    known = [each.name for each in fields(ReducerSettings)]
    if isinstance(entry, Mapping) and "name" in entry and set(entry) <= set(known):
        return [ReducerSettings(**{str(key): value for key, value in entry.items()})]
    raise UserError(f"reducers holds {entry!r}: give a name, a folder, or {{name: ..., options: {{...}}}}")
