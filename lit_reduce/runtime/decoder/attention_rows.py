"""Rows of attention that reducers inside the language model read from its layers, never a whole map."""

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.attention.probe import AttentionProbe
from lit_reduce.runtime.attention.signals import Signal
from lit_reduce.runtime.cache_compat import CACHE
from lit_reduce.runtime.decoder.prefill_state import PrefillState
from lit_reduce.runtime.decoder.prompt import ImageTokens, Prompt
from lit_reduce.runtime.gather import gather_rows

ROWS = frozenset({"last", "text_rows", "image_rows"})  # read from a decoder layer's attention
# What the language model itself gives; all else comes from the tower.
DECODER_SIGNALS = ROWS | {"text", "text_mask", "size", "place", "gate"}


def from_tower(reducer: Reducer) -> frozenset[str]:
    """The signals that a reducer inside the language model wants of the vision tower.

    Raises:
        UserError: one that does not say something about each token.
    """
    asked = frozenset(text for text in reducer.signals if Signal.parse(text).name not in DECODER_SIGNALS)
    if whole := sorted(text for text in asked if Signal.parse(text).name == "cls_query"):
        raise UserError(
            f"'{reducer.name}' acts inside the language model, where signals follow their tokens; '{whole[0]}' is one "
            "for the whole image, so ask for it at the projector"
        )
    return asked


def sources(reducer: Reducer, stage: int, depth: int) -> dict[str, int]:
    """The decoder layer that each of a reducer's attention signals is read from, for its stage at one layer.

    Between layers that is the layer before (before the first one the first itself, see `AttentionRows.ahead`), at the
    cache the layer itself, unless the signal names another.

    Raises:
        UserError: the layer comes too late.
    """
    at_cache = reducer.site == "cache"
    found = {}
    for text in reducer.signals:
        signal = Signal.parse(text)
        if signal.name not in ROWS:
            continue
        found[text] = signal.at(depth, stage if at_cache else max(0, stage - 1))
        if found[text] >= max(1, stage + at_cache):
            raise UserError(
                f"'{reducer.name}' reads the signal '{text}' in a layer before layer {stage}, and there is none; "
                "let it act in a later layer"
            )
    return found


class RowQueries(NamedTuple):
    """Tokens of an image whose attention rows are read.

    Attributes:
        first: The first of their rows, among those of all images of the sample.
        columns: ``[R]``, where they stand among the tokens of the layer.
        real: ``[R]`` bool, false where there are fewer than R.
    """

    first: int
    columns: Tensor
    real: Tensor


def row_queries(state: PrefillState, most: int = 64) -> dict[int, RowQueries]:
    """Up to ``most`` tokens of each image, evenly spread among those that are left and open, by the image's number."""
    found, taken = dict[int, RowQueries](), dict[int, int]()
    for picture in state.pictures:
        open_ = picture.open.detach() > 0.5
        open_ = open_ if bool(open_.any()) else torch.ones_like(open_)
        count, many = min(most, picture.count), int(open_.sum())
        index = torch.arange(count, device=open_.device)
        order = torch.argsort((~open_).int(), stable=True)
        first = taken.get(picture.row, 0)
        found[picture.number] = RowQueries(
            first, picture.columns[order[index * max(many, count) // count]], index < many
        )
        taken[picture.row] = first + count
    return found


class AttentionRows:
    """Probes on the layers whose attention reducers rank by, in place only while a prompt is read.

    Attributes:
        pictures: For each layer of this pass, the images with their columns among the layer's keys.
    """

    def __init__(self, lm: Any) -> None:
        self.layers = lm.layers
        self.pictures: dict[int, list[ImageTokens]] = {}
        self._probes: dict[int, AttentionProbe] = {}
        self._looks: dict[int, dict[int, RowQueries]] = {}
        self._ahead = self._image = False
        self._text = self._text_mask = torch.empty(0)

    def start(self, prompt: Prompt, embeds: Tensor, decoder: Reducer | None, cache: Reducer | None) -> None:
        """Place the probes that this prompt's stages need."""
        self.stop()
        self._text_mask = prompt.text_mask
        self._text = gather_rows(embeds, prompt.text, 1) * prompt.text_mask[..., None]
        self._ahead = decoder is not None and any(0 in picture.stages for picture in prompt.pictures)
        asked = [decoder.signals if decoder is not None else (), cache.signals if cache is not None else ()]
        self._image = any(Signal.parse(text).name == "image_rows" for text in chain(*asked))
        wanted: set[int] = set()
        for picture in prompt.pictures:
            for reducer, stages in ((decoder, picture.stages), (cache, picture.cached)):
                for stage in stages if reducer is not None else ():
                    wanted |= set(sources(reducer, stage, len(self.layers)).values())  # type: ignore[arg-type]
        for layer in wanted:
            self._probes[layer] = AttentionProbe(self.layers[layer].self_attn).__enter__()

    def stop(self) -> None:
        """Take the probes away; what was read goes with them."""
        for probe in self._probes.values():
            probe.__exit__()
        self._probes = {}
        self.pictures, self._looks = {}, {}

    def ahead(self, layer: Any, hidden: Tensor, kwargs: dict[str, Any], state: PrefillState) -> None:
        """Read the first layer before it runs, for a stage that has none before it: its attention works twice.

        Of a conversation that goes on, the rows are those of the new prompt alone.
        """
        if not self._ahead or 0 not in self._probes:
            return
        self.aim(0, state, 0)
        mask = kwargs.get("attention_mask")
        alone = {"attention_mask": None if mask is None else mask[..., -hidden.shape[1] :], CACHE: None}
        with torch.no_grad():
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs | alone)

    def aim(self, layer: int, state: PrefillState, offset: int) -> None:
        """Before a layer runs: which rows to read, and where the keys of its tokens begin."""
        self.pictures[layer] = [picture.moved(picture.columns + offset) for picture in state.pictures]
        if layer in self._probes:
            looks = self._looks[layer] = row_queries(state) if self._image else {}
            wide = max((look.first + len(look.columns) for look in looks.values()), default=0)
            index = state.text.new_zeros(len(state.text), wide)
            for picture in state.pictures if looks else ():
                look = looks[picture.number]
                index[picture.row, look.first : look.first + len(look.columns)] = look.columns
            self._probes[layer].asked = torch.cat([state.last[:, None], state.text, index], 1)

    def read(self, reducer: Reducer, stage: int, group: list[ImageTokens]) -> dict[str, Tensor]:
        """The signals of some images of equal count, at a reducer's stage."""
        samples = torch.tensor([picture.row for picture in group], device=group[0].columns.device)
        mask = self._text_mask[samples]
        out = {"text": self._text[samples], "text_mask": mask, "size": torch.stack([p.size for p in group])}
        out |= {"place": torch.stack([p.kept_indices for p in group]), "gate": torch.stack([p.open for p in group])}
        for text, layer in sources(reducer, stage, len(self.layers)).items():
            attention = self._probes[layer].rows[-1].mean(1)[samples]  # over heads: [G, 1 + T, keys]
            columns = torch.stack([self._columns(layer, picture) for picture in group])
            name, words = Signal.parse(text).name, 1 + mask.shape[1]
            if name == "image_rows":
                looks = [self._looks[layer][picture.number] for picture in group]
                mine = torch.stack([words + torch.arange(len(x.columns), device=mask.device) + x.first for x in looks])
                rows, real = gather_rows(attention, mine, 1), torch.stack([x.real for x in looks])
            else:
                rows, real = (attention[:, :1], mask.new_ones(1)) if name == "last" else (attention[:, 1:words], mask)
            found = gather_rows(rows, columns, 2).masked_fill(
                ~real[..., None], 0
            )  # rows of padding, perhaps not numbers
            out[text] = found[:, 0] if name == "last" else found
        for text in reducer.signals - out.keys():
            given = [picture.given[text] for picture in group if text in picture.given]
            if len(given) == len(group):
                out[text] = torch.stack(given)
        return out

    def _columns(self, layer: int, picture: ImageTokens) -> Tensor:
        """Where the keys of a picture's tokens stand in a layer that may have had more of them."""
        before = next(p for p in self.pictures[layer] if p.number == picture.number)
        return before.columns[torch.searchsorted(before.kept_indices, picture.kept_indices)]
