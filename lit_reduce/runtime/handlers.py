"""Which handler serves which reducer, and the facts about a reducer that follow from it without a model."""

from typing import Any

from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.compressed_kv_site import CompressedKVSite
from lit_reduce.runtime.decoder.site import DecoderSite
from lit_reduce.runtime.projector import ProjectorSite
from lit_reduce.runtime.recall.site import RecallSite
from lit_reduce.runtime.site import SiteHandler, Sites
from lit_reduce.runtime.vision.site import EncoderSite

# In the order in which an image meets their sites; of two that serve a reducer the special one comes first.
HANDLERS: tuple[type[SiteHandler], ...] = (EncoderSite, RecallSite, ProjectorSite, CompressedKVSite, DecoderSite)


def handler_of(reducer: Reducer) -> type[SiteHandler]:
    """The handler class that serves a reducer."""
    return next(handler for handler in HANDLERS if handler.serves(reducer))


def handlers_for(model: Any, sites: Sites, progress: float | None = None) -> list[SiteHandler]:
    """Handlers for the reducers at all sites, in the order in which an image meets them; nothing is installed yet.

    Args:
        model: The backbone.
        sites: The reducer and its budget at each site.
        progress: Of training, see `Session`.

    Raises:
        UserError: a reducer that this model cannot serve.
    """
    found: dict[type[SiteHandler], dict[str, Any]] = {handler: {} for handler in HANDLERS}
    for site, (reducer, keep) in sites.items():
        found[handler_of(reducer)][site] = reducer, keep
    return [handler(model, mine, progress) for handler, mine in found.items() if mine]


def tower_signals(reducer: Reducer) -> frozenset[str]:
    """The signals that one pass of the vision tower must give for a reducer.

    Raises:
        UserError: one that makes no sense at the reducer's site.
    """
    return handler_of(reducer).tower_signals(reducer)


def shares_encoding(reducer: Reducer) -> bool:
    """Whether the tower runs as in the plain model, so that one pass of it serves several reducers."""
    return handler_of(reducer).shares_encoding
