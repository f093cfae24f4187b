"""Token counts of the layers of tower and language model, from which FLOPs are counted."""

from dataclasses import dataclass, replace

from lit_reduce.reducer import Reducer


@dataclass(frozen=True)
class LayerTokens:
    """How many tokens of one image each layer works on, from which FLOPs are counted.

    Attributes:
        patches: In each block of the tower, patches (of packed towers: visual tokens) that enter its attention.
        mlp_patches: Likewise, those that enter its MLP.
        registers: Likewise, learned tokens beside the patches.
        projected: Patches (visual tokens) that reach the projector.
        decoder: In each layer of the language model.
        cached: In each layer of the cache behind the prompt.
        extra_pass: Learned tokens that read the prompt up to the image in a pass of their own.
        arrived: Tokens that entered the language model in a measured run; None where that follows from the budget.
    """

    patches: list[int]
    mlp_patches: list[int]
    registers: list[int]
    projected: int
    decoder: list[int]
    cached: list[int]
    extra_pass: int = 0
    arrived: int | None = None

    def entering(self, count: int) -> "LayerTokens":
        """The same when ``count`` tokens enter the language model, unless a measured run says otherwise."""
        count = count if self.arrived is None else self.arrived
        return replace(self, decoder=[count] * len(self.decoder), cached=[count] * len(self.cached))


def layer_counts(reducer: Reducer, depth: int, tokens: int, keep: int, alone: bool = False) -> list[int]:
    """Visual tokens of one image in each of ``depth`` layers, when ``tokens`` enter the first one.

    Args:
        reducer: Whose `Reducer.stages` say so.
        depth: Layers.
        tokens: Of the image.
        keep: Its budget.
        alone: Whether each stage holds for its layer alone.
    """
    stages = reducer.stages(depth, tokens, keep) if keep < tokens else {}
    counts, left = [], tokens
    for layer in range(depth):
        left = stages.get(layer, tokens if alone else left)
        counts.append(left)
    return counts
