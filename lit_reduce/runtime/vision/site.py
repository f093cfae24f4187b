"""Handler of the site ``encoder``: a reducer inside the vision tower."""

from dataclasses import replace
from typing import Any

from lit_reduce.backbones.families import Family, family_of
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.layer_tokens import LayerTokens, layer_counts
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.site import SiteHandler, Sites
from lit_reduce.runtime.vision.base import TowerHooks
from lit_reduce.runtime.vision.batched import BatchedTowerHooks
from lit_reduce.runtime.vision.packed import PackedTowerHooks
from lit_reduce.runtime.vision.registers import Registers
from lit_reduce.tokens import Budget


class EncoderSite(SiteHandler):
    """Hooks in the vision tower, which act whenever it encodes an image."""

    shares_encoding = False

    def __init__(self, model: Any, sites: Sites, progress: float | None = None) -> None:
        super().__init__(model, sites, progress)
        self.hooks = tower_hooks(model, self.family, *self.sites["encoder"])

    @classmethod
    def serves(cls, reducer: Reducer) -> bool:
        """See `SiteHandler`."""
        return reducer.site == "encoder"

    @classmethod
    def tower_signals(cls, reducer: Reducer) -> frozenset[str]:  # noqa: ARG003
        """See `SiteHandler`: none, since the hooks read them where they act."""
        return frozenset()

    def check(self, alone: bool, positions: str) -> None:
        """See `SiteHandler`: the budget counts the tower's tokens, which `TowerHooks` compares."""

    def install(self, patches: Patches) -> None:
        """See `SiteHandler`."""
        patches.install(self.hooks)

    def keeps_all(self, count: int) -> bool:  # noqa: ARG002
        """See `SiteHandler`: not known from the count of visual tokens."""
        return False

    def thin(self, tokens: LayerTokens) -> LayerTokens:
        """See `SiteHandler`."""
        reducer, budget = self.sites["encoder"]
        tower, each, blocks = self.hooks.tower, tokens.patches[0], len(tokens.patches)
        keep = budget.count(each)
        counts, registers = layer_counts(reducer, tower.depth, each, keep), [0] * blocks
        if reducer.kind == "register":  # of a tile in each block, beside its patches
            registers[: tower.depth] = [0 if count == each else count for count in counts]
            registers[tower.depth :] = [max(registers)] * (blocks - tower.depth)
            counts = [each] * tower.depth
        behind = counts[-1] if stays_short(self.model) else each  # what the blocks get that feed nothing
        counts += [behind] * (blocks - len(counts))
        late = self.hooks.point == "attention"  # such a reducer leaves this block's attention alone
        arriving = [each, *counts[:-1]] if late else list(counts)
        arriving[tower.depth :] = counts[tower.depth :]
        thinned = replace(tokens, patches=arriving, mlp_patches=counts, registers=registers, projected=behind)
        return thinned.entering(keep if stays_short(self.model) else tokens.decoder[0])


def stays_short(model: Any) -> bool:
    """Whether what a reducer inside the tower drops is gone for good, and does not come back before the projector."""
    family = family_of(model.config)
    return family.tokenwise and family.row(model) is None


def tower_hooks(model: Any, family: Family, reducer: Reducer, keep: Budget) -> TowerHooks:
    """The hooks that fit a model's tower and a reducer, not yet installed.

    Args:
        model: The backbone.
        family: Its family.
        reducer: Of site ``encoder``; ``reducer.point`` says whether it acts before a block, or between its attention
            and its MLP.
        keep: Tower tokens that stay of each image, or of each tile where images are cut into tiles; of towers that
            pack all images into one row, visual tokens.

    Raises:
        UserError: a tower, a point, a reducer or a signal that cannot be served.
    """
    if reducer.kind == "register":
        return Registers(model, family, reducer, keep)
    row = family.row(model)
    if row is not None:
        return PackedTowerHooks(model, row, reducer, keep)
    return BatchedTowerHooks(model, family, reducer, keep)
