"""Where the blocks of a vision tower are, found by the few layouts that transformers uses."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_reduce.errors import UserError

BLOCKS = ("encoder.layers", "encoder.layer", "blocks", "transformer.layers")
ATTENTION = ("self_attn", "attention", "attn")
MLP = ("mlp", "feed_forward")
CLS = ("class_embedding", "cls_token")


@dataclass(frozen=True)
class Tower:
    """The vision tower of a model.

    Attributes:
        blocks: Its transformer blocks.
        prefix: Tokens before the patches, such as CLS.
        feature: Index of the block whose output feeds the projector.
    """

    blocks: nn.ModuleList
    prefix: int
    feature: int

    @property
    def depth(self) -> int:
        """Blocks up to the one that feeds the projector."""
        return self.feature + 1

    def attention(self, block: int) -> nn.Module:
        """The attention module of a block."""
        return part(self.blocks[block], ATTENTION)

    def mlp(self, block: int) -> nn.Module:
        """The MLP of a block."""
        return part(self.blocks[block], MLP)


def tower_of(model: Any) -> Tower:
    """The vision tower of a model.

    Raises:
        UserError: its blocks, or their attention, are not where any known tower has them.
    """
    tower = model.get_encoder("image")
    tower = getattr(tower, "vision_model", tower)
    for path in BLOCKS:
        blocks: Any = tower
        for name in path.split("."):
            blocks = getattr(blocks, name, None)
        if isinstance(blocks, nn.ModuleList):
            break
    else:
        raise UserError(f"the vision tower {type(tower).__name__} has no blocks at {', '.join(BLOCKS)}")
    part(blocks[0], ATTENTION)
    stem = getattr(tower, "embeddings", None)
    prefix = int(any(getattr(stem, name, None) is not None for name in CLS))
    layer = getattr(model.config, "vision_feature_layer", -1)
    layer = layer if isinstance(layer, int) else layer[-1]
    # hidden_states[0] is the embedding, so a positive index names the block before it.
    return Tower(blocks, prefix, layer + len(blocks) if layer < 0 else layer - 1)


def part(block: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The part of a block that goes by one of these names.

    Raises:
        UserError: it has none.
    """
    for name in names:
        found = getattr(block, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UserError(f"the block {type(block).__name__} has no part called {' or '.join(names)}")
