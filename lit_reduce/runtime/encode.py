"""Runs the vision tower once and collects the signals that reducers declare."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_reduce.backbones.families import Family, Grid, family_of
from lit_reduce.backbones.layouts import Kept
from lit_reduce.errors import UserError
from lit_reduce.runtime.attention.signals import TOWER, Signal, SignalRecorder
from lit_reduce.runtime.gather import gather_filled, right_padded
from lit_reduce.runtime.vision.base import installed
from lit_reduce.tokens import VisualTokens

SIGNALS = TOWER | {"text", "size"}
IGNORE = -100  # label of a token that is not an answer
MEDIA = ("image", "video")
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """The images of a batch after the vision tower and the projector, one entry for each image or video.

    Attributes:
        features: ``[n_i, D]`` projected tokens.
        grids: Frames, rows and columns.
        samples: Which prompt of the batch holds the image.
        signals: For each declared signal of the tower one tensor an image, ``[n_i]``, ``[n_i, C]`` or ``[C]``.
        text: ``[B, T, D]`` embeddings of the prompts' text tokens, or None when nobody asked.
        text_mask: ``[B, T]``, true at real tokens.
        kinds: ``image`` or ``video``; all are images when empty.
        deepstack: For each level of a model that adds visual features to deeper layers, ``[n_i, D]`` of each image.
        kept_indices: Where the tower itself was reduced, the original index of each row of the features; else empty.
        totals: And the image's tokens before that.
        elapsed_ms: Milliseconds that a reducer inside the tower took.
        pictures: For each entry the number of its picture, where prompts of a batch that begin alike share pictures, so
            that work can be done once for each; empty where all differ.
    """

    features: list[Tensor]
    grids: list[Grid]
    samples: list[int]
    signals: dict[str, list[Tensor]] = field(default_factory=dict)
    text: Tensor | None = None
    text_mask: Tensor | None = None
    kinds: list[str] = field(default_factory=list)
    deepstack: list[list[Tensor]] = field(default_factory=list)
    kept_indices: list[Tensor] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    elapsed_ms: float = 0.0
    pictures: list[int] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Visual tokens of each image before any reduction."""
        return self.totals or [len(x) for x in self.features]

    def tokens(self, images: list[int], signals: Iterable[str]) -> VisualTokens:
        """What a reducer sees of some images of equal token count and grid, with the signals that it declared."""
        given = {name: torch.stack([self.signals[name][i] for i in images]) for name in signals if name in self.signals}
        if "text" in signals and self.text is not None and self.text_mask is not None:
            rows = torch.tensor([self.samples[i] for i in images], device=self.text.device)
            given |= {"text": self.text[rows], "text_mask": self.text_mask[rows]}
        return VisualTokens(torch.stack([self.features[i] for i in images]), self.grids[images[0]], given)

    def each(self, pictures: Sequence[int]) -> "Encoded":
        """Some of the pictures, each as often as it is named, one for each prompt of another batch."""

        def named(entries: list[T]) -> list[T]:
            return [entries[picture] for picture in pictures] if entries else []

        rows = named(self.samples)
        return replace(
            self, features=named(self.features), grids=named(self.grids), samples=list(range(len(rows))),
            signals={name: named(held) for name, held in self.signals.items()},
            text=None if self.text is None else self.text[rows],
            text_mask=None if self.text_mask is None else self.text_mask[rows],
            kinds=named(self.kinds), deepstack=[named(level) for level in self.deepstack],
            kept_indices=named(self.kept_indices), totals=named(self.totals), pictures=named(self.pictures),
        )  # fmt: skip

    def of(self, kind: str) -> list[int]:
        """Which entries are images, or videos."""
        kinds = self.kinds or ["image"] * len(self.features)
        return [i for i, own in enumerate(kinds) if own == kind]


def encode(model: Any, inputs: Mapping[str, Any], signals: Iterable[str] = (), family: Family | None = None) -> Encoded:
    """One pass through tower and projector, for any number of later calls of `reduce_images` and `shorten`.

    Args:
        model: The frozen backbone.
        inputs: What the processor made; ``labels``, if present, mark answer tokens, which no reducer may see.
        signals: The union of what the reducers declare, each ``name`` or ``name@layer``.
        family: Looked up from the model when None.

    Raises:
        UserError: an unknown signal, one that this backbone cannot give, or placeholders that do not fit the images.
    """
    with torch.no_grad():
        return trace(model, inputs, signals, family)


def trace(model: Any, inputs: Mapping[str, Any], signals: Iterable[str] = (), family: Family | None = None) -> Encoded:
    """`encode` with gradients, for the training of what acts inside the tower."""
    family = family or family_of(model.config)
    asked = {text: Signal.parse(text) for text in frozenset(signals)}
    if unknown := sorted(text for text, signal in asked.items() if signal.name not in SIGNALS):
        raise UserError(f"no tower gives the signal '{unknown[0]}'; known: {', '.join(sorted(SIGNALS))}")
    text, mask = prompt_text(model, inputs) if "text" in asked else (None, None)
    found = Encoded([], [], [], {}, text, mask)
    hooks = installed(model)
    whole = None if hooks is None else hooks.whole
    for kind in family.kinds(inputs):
        layout = family.layout(kind, inputs)
        pictures = layout.pictures(model, inputs)
        counts = [picture.count for picture in pictures]
        owners = _owners(placeholders(model, inputs["input_ids"], kind), counts)
        if hooks is not None:
            hooks.prepare(layout, inputs)
        with SignalRecorder(model, family, asked) as recorder:
            out = _features(model, inputs, kind)
        left = [] if hooks is None else hooks.left(layout, inputs, counts)
        found.kept_indices.extend(left)
        found.totals.extend(counts if left else [])
        if left and hooks is not None and hooks.short:
            layout, counts, left = Kept(torch.stack(left)), [len(kept_indices) for kept_indices in left], []
        found.features.extend(_rows(_split(out.pooler_output, counts), left))
        found.grids.extend(picture.grid for picture in pictures)
        found.samples.extend(owners)
        found.kinds.extend([kind] * len(pictures))
        for level, features in enumerate(getattr(out, "deepstack_features", None) or []):
            found.deepstack.extend([] for _ in range(level + 1 - len(found.deepstack)))
            found.deepstack[level].extend(_split(features, counts))
        for name, rows in recorder.read(layout, inputs, counts, whole).items():
            alone = asked[name].name == "cls_query"  # one for the whole picture
            found.signals.setdefault(name, []).extend(rows if alone else _rows(rows, left))
        if "size" in asked:
            merged = None if hooks is None else hooks.sizes()
            sizes = torch.ones(sum(counts)).split(counts) if merged is None else merged
            found.signals.setdefault("size", []).extend(size.to(found.features[0]) for size in sizes)
    return found if hooks is None else replace(found, elapsed_ms=hooks.take_elapsed_ms())


def encoder_keys(model: Any) -> frozenset[str]:
    """Names of the inputs that only the vision tower reads."""
    keys = {name for kind in MEDIA if _reader(model, kind) for name in _parameters(_reader(model, kind))}
    return frozenset(keys)


def placeholders(model: Any, ids: Tensor, kind: str | None = None) -> Tensor:
    """``[B, L]``, true where a visual token stands: of any kind, or of images or videos alone."""
    tokens = [getattr(model.config, f"{own}_token_id", None) for own in (MEDIA if kind is None else (kind,))]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        mask = mask if token is None else mask | (ids == token)
    return mask


def prompt_text(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, T, D]`` of the text tokens of the prompts, packed to the left, and which are real ``[B, T]``.

    Image tokens, padding and answers (labels other than -100) are left out.
    """
    ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
    real = ~placeholders(model, ids)
    real = real if mask is None else real & mask.bool()
    real = real if labels is None else real & (labels == IGNORE)
    order, text_mask = right_padded(real)
    text: Tensor = model.get_input_embeddings()(gather_filled(ids, order, text_mask, 0))
    return text * text_mask[..., None], text_mask


def _reader(model: Any, kind: str) -> Any:
    return getattr(model.base_model, f"get_{kind}_features", None)


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"kwargs"}


def _features(model: Any, inputs: Mapping[str, Any], kind: str) -> Any:
    """The call that ``generate`` itself makes."""
    reader = _reader(model, kind)
    keys = {name: inputs[name] for name in _parameters(reader) if inputs.get(name) is not None}
    return reader(**keys, return_dict=True)


def _split(features: Iterable[Tensor], counts: list[int]) -> list[Tensor]:
    """Features of each picture, from a list or tensor with another entry for each tile, picture or prompt."""
    flat = torch.cat([x.flatten(0, -2) for x in features])
    return list(flat.split(counts))


def _rows(pictures: list[Tensor], left: list[Tensor]) -> list[Tensor]:
    """Of each picture the rows that are left, or all of them where nothing is said."""
    return [x[rows] for x, rows in zip(pictures, left, strict=True)] if left else pictures


def _owners(where: Tensor, counts: list[int]) -> list[int]:
    """The prompt of each picture.

    Raises:
        UserError: prompts and pictures disagree about the number of tokens.
    """
    rows = where.nonzero()[:, 0]
    if len(rows) != sum(counts):
        raise UserError(
            f"the prompts hold {len(rows)} image tokens, but the images give {sum(counts)}; "
            "pass exactly the images that the prompts name, and do not truncate the prompt"
        )
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    owners: list[int] = rows[starts.to(rows.device)].tolist()
    return owners
