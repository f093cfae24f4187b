"""What reducers inside the language model may ask of its layers: a few attention rows, never a whole map."""

from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.flow import Flow, Picture, Prompt
from lit_reduce.runtime.signals import Signal
from lit_reduce.runtime.slots import take
from lit_reduce.runtime.taps import Tap

ROWS = frozenset({"last", "text_rows"})  # read from a decoder layer's attention
INSIDE = ROWS | {"text", "text_mask", "size"}  # what the language model itself gives; all else comes from the tower


def from_tower(reducer: Reducer) -> frozenset[str]:
    """The signals that a reducer inside the language model wants of the vision tower.

    Raises:
        UserError: one that does not say something about each token.
    """
    asked = frozenset(text for text in reducer.signals if Signal.parse(text).name not in INSIDE)
    if whole := sorted(text for text in asked if Signal.parse(text).name == "cls_query"):
        raise UserError(
            f"'{reducer.name}' acts inside the language model, where signals follow their tokens; '{whole[0]}' is one "
            "for the whole image, so ask for it at the projector"
        )
    return asked


def sources(reducer: Reducer, stage: int, depth: int) -> dict[str, int]:
    """The decoder layer that each of a reducer's attention signals is read from, for its stage at one layer.

    Between layers that is the layer before, at the cache the layer itself, unless the signal names another.

    Raises:
        UserError: the layer comes too late.
    """
    at_cache = reducer.site == "cache"
    found = {}
    for text in reducer.signals:
        signal = Signal.parse(text)
        if signal.name not in ROWS:
            continue
        found[text] = signal.at(depth, stage if at_cache else stage - 1)
        if not 0 <= found[text] < stage + at_cache:
            raise UserError(
                f"'{reducer.name}' reads the signal '{text}' in a layer before layer {stage}, and there is none; "
                "let it act in a later layer"
            )
    return found


class LayerRows:
    """Taps on the layers whose attention reducers rank by, in place only while a prompt is read.

    Attributes:
        pictures: For each layer of this pass, the images with their columns among the layer's keys.
    """

    def __init__(self, lm: Any) -> None:
        self.layers = lm.layers
        self.pictures: dict[int, list[Picture]] = {}
        self._taps: dict[int, Tap] = {}
        self._text = self._text_mask = torch.empty(0)

    def start(self, prompt: Prompt, embeds: Tensor, decoder: Reducer | None, cache: Reducer | None) -> None:
        """Place the taps that this prompt's stages need."""
        self.stop()
        self._text_mask = prompt.text_mask
        self._text = take(embeds, prompt.text, 1) * prompt.text_mask[..., None]
        wanted: set[int] = set()
        for picture in prompt.pictures:
            for reducer, stages in ((decoder, picture.stages), (cache, picture.cached)):
                for stage in stages if reducer is not None else ():
                    wanted |= set(sources(reducer, stage, len(self.layers)).values())  # type: ignore[arg-type]
        for layer in wanted:
            self._taps[layer] = Tap(self.layers[layer].self_attn).__enter__()

    def stop(self) -> None:
        """Take the taps away; what was read goes with them."""
        for tap in self._taps.values():
            tap.__exit__()
        self._taps = {}
        self.pictures = {}

    def aim(self, layer: int, flow: Flow, offset: int) -> None:
        """Before a layer runs: which rows to read, and where the keys of its tokens begin."""
        self.pictures[layer] = [picture.moved(picture.columns + offset) for picture in flow.pictures]
        if layer in self._taps:
            self._taps[layer].asked = torch.cat([flow.last[:, None], flow.text], 1)

    def read(self, reducer: Reducer, stage: int, group: list[Picture]) -> dict[str, Tensor]:
        """The signals of some pictures of equal count, at a reducer's stage."""
        samples = torch.tensor([picture.row for picture in group], device=group[0].columns.device)
        mask = self._text_mask[samples]
        out = {"text": self._text[samples], "text_mask": mask, "size": torch.stack([p.size for p in group])}
        for text, layer in sources(reducer, stage, len(self.layers)).items():
            attention = self._taps[layer].rows[-1].mean(1)[samples]  # over heads: [G, 1 + T, keys]
            columns = torch.stack([self._columns(layer, picture) for picture in group])
            found = take(attention, columns, 2)
            words = found[:, 1:].masked_fill(~mask[..., None], 0)  # rows of padding are nobody's, perhaps not numbers
            out[text] = found[:, 0] if Signal.parse(text).name == "last" else words
        for text in reducer.signals - out.keys():
            given = [picture.given[text] for picture in group if text in picture.given]
            if len(given) == len(group):
                out[text] = torch.stack(given)
        return out

    def _columns(self, layer: int, picture: Picture) -> Tensor:
        """Where the keys of a picture's tokens stand in a layer that may have had more of them."""
        before = next(p for p in self.pictures[layer] if p.number == picture.number)
        return before.columns[torch.searchsorted(before.anchors, picture.anchors)]
