"""The cache among the arguments and results of a model: ``cache`` since transformers 5.24, ``past_key_values`` before.

Calls from outside may use either name; between the modules of a model there is only the present one.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import LlamaModel

BEFORE = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else BEFORE


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, or None."""
    found = arguments.get(CACHE)
    return arguments.get(BEFORE) if found is None else found


def cache_of(out: Any) -> Any:
    """The cache that a model's output holds, or None."""
    return getattr(out, CACHE, None)
