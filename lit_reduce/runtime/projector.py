"""Handler of the site ``projector``: a reducer between the projector and the language model."""

from collections.abc import Mapping
from typing import Any

from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import ReducedImages, reduce_images
from lit_reduce.runtime.encode import Encoded
from lit_reduce.runtime.layer_tokens import LayerTokens
from lit_reduce.runtime.site import SiteHandler
from lit_reduce.tokens import Budget


class ProjectorSite(SiteHandler):
    """Reduces the images before the prompt is shortened."""

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """See `SiteHandler`."""
        return reducer.site == "projector"

    def reduce(self, inputs: Mapping[str, Any], encoded: Encoded, images: ReducedImages) -> ReducedImages:  # noqa: ARG002
        """See `SiteHandler`."""
        return reduce_images(encoded, *self._only)

    def thin(self, tokens: LayerTokens) -> LayerTokens:
        """See `SiteHandler`."""
        return tokens.entering(self._only[1].count(tokens.decoder[0]))

    @property
    def _only(self) -> tuple[Reducer, Budget]:
        (found,) = self.sites.values()
        return found
