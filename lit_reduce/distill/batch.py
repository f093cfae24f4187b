"""The batches of a training step: padded prompts, visual tokens and the teacher's outputs.

A batch holds pictures of one grid. A step whose pictures differ in size has one batch for each grid, so that every
picture is trained on its own rows and columns, and nothing is computed on padding between visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.teacher import DEEPSTACK, PIXELS, SIGNAL, SIZES, TYPES, Outputs
from lit_reduce.runtime.encode import IGNORE, Encoded, prompt_text


@dataclass
class Batch:
    """B questions about pictures of one grid, with the teacher's outputs.

    Attributes:
        features: [B, N, D] visual tokens.
        grid: Frames, rows and columns.
        ids: [B, L] prompt with image placeholders and answer, padded on the left.
        mask: [B, L].
        labels: [B, L], the answer's ids where they stand, -100 elsewhere.
        guide: [B, N] the teacher's attention.
        top: [A, k] the teacher's log-probabilities at the A answer tokens, row by row.
        top_ids: [A, k].
        step: Of training, from which budgets are drawn.
        signals: Further outputs of the vision tower by name, one entry for each question.
        pixels: What the vision tower reads, by the names of its inputs, one entry for each of P pictures; for reducers
            inside the tower alone.
        picture: [B], which of these pictures each question is about.
        numbers: [B] of each question within the step, over all processes; noise is drawn by them.
        deepstack: [B, N, D] visual features for deeper layers by level, for models that have them (Qwen3-VL).
        types: [B, L] token types by the names of the model's inputs, for models that read them.
        sizes: What the model reads about the size of each question's picture, by the names of its inputs.
    """

    features: Tensor
    grid: tuple[int, int, int]
    ids: Tensor
    mask: Tensor
    labels: Tensor
    guide: Tensor
    top: Tensor
    top_ids: Tensor
    step: int = 0
    signals: dict[str, Tensor] = field(default_factory=dict)
    pixels: dict[str, Tensor] = field(default_factory=dict)
    picture: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    deepstack: dict[str, Tensor] = field(default_factory=dict)
    types: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """Moves every tensor."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        held = {k: v for k, v in vars(self).items() if isinstance(v, dict)}
        moved |= {k: {name: x.to(device) for name, x in v.items()} for k, v in held.items()}
        return replace(self, **moved)

    @property
    def inputs(self) -> dict[str, Any]:
        """Model inputs; the labels say what no reducer may see."""
        return {
            "input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels, **self.types, **self.sizes
        }  # fmt: skip

    @property
    def firsts(self) -> list[int]:
        """The first question about each picture: what is done once for a picture is done for these."""
        order: list[int] = self.picture.tolist()
        return [order.index(picture) for picture in range(max(order) + 1)]

    def encoded(self, model: Any) -> Encoded:
        """The pictures as `encode` would give them, with the prompts' embeddings but not the answers'."""
        with torch.no_grad():
            text, text_mask = prompt_text(model, self.inputs)
        count = len(self.features)
        features = list(self.features.to(text.dtype))
        signals = {name: list(x.to(text.dtype)) for name, x in self.signals.items()}
        pictures = self.picture.tolist()
        deepstack = [list(level.to(text.dtype)) for _, level in sorted(self.deepstack.items())]
        return Encoded(
            features, [self.grid] * count, list(range(count)), signals, text, text_mask, deepstack=deepstack,
            pictures=pictures,
        )  # fmt: skip


def make_batches(
    picked: Sequence[tuple[Outputs, Sequence[int]]], step: int = 0, pad: int = 0, numbers: Sequence[int] | None = None
) -> list[Batch]:
    """Collates turns of several groups into one batch for each size of picture, in the order in which these come.

    Args:
        picked: For each group its teacher outputs and the indices of the turns taken.
        step: Of training.
        pad: Id of padding.
        numbers: Of the questions within the step; by default they are counted.
    """
    counted = list(range(sum(len(turns) for _, turns in picked))) if numbers is None else list(numbers)
    sizes = dict[tuple[int, ...], tuple[list[tuple[Outputs, Sequence[int]]], list[int]]]()
    start = 0
    for outputs, turns in picked:
        members, own = sizes.setdefault((len(outputs["features"]), *outputs["grid"].tolist()), ([], []))
        members.append((outputs, turns))
        own += counted[start : start + len(turns)]
        start += len(turns)
    return [make_batch(members, step, pad, own) for members, own in sizes.values()]


def make_batch(
    picked: Sequence[tuple[Outputs, Sequence[int]]], step: int = 0, pad: int = 0, numbers: Sequence[int] | None = None
) -> Batch:
    """Collates turns of several groups, whose pictures have one grid, into one batch.

    Args:
        picked: For each group its teacher outputs and the indices of the turns taken.
        step: Of training.
        pad: Id of padding.
        numbers: Of the questions within the step; by default they are counted.
    """
    ids, labels, rows = [], [], dict[str, list[Tensor]](features=[], guide=[], top=[], top_ids=[])
    first = picked[0][0]
    pictures = {name: list[Tensor]() for name in first if name.startswith((SIGNAL, DEEPSTACK, SIZES))}
    types = {name: list[Tensor]() for name in first if name.startswith(TYPES)}
    for outputs, turns in picked:
        lengths = outputs["lengths"]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.sum(1).cumsum(0)])
        answers = torch.cat([torch.zeros(1, dtype=torch.long), lengths[:, 1].cumsum(0)])
        for t in turns:
            tail = outputs["suffix"][starts[t] : starts[t + 1]].long()
            row = torch.cat([outputs["prefix"].long(), tail])
            label = torch.full_like(row, IGNORE)
            label[len(row) - int(lengths[t, 1]) :] = row[len(row) - int(lengths[t, 1]) :]
            ids.append(row)
            labels.append(label)
            rows["features"].append(outputs["features"])
            for name, values in pictures.items():
                values.append(outputs[name])
            for name, values in types.items():
                prompt = outputs[name][: len(outputs["prefix"])]
                values.append(torch.cat([prompt, outputs[name][len(prompt) :][starts[t] : starts[t + 1]]]).long())
            rows["guide"].append(outputs["guide"][t].float())
            rows["top"].append(outputs["top"][answers[t] : answers[t + 1]].float())
            rows["top_ids"].append(outputs["top_ids"][answers[t] : answers[t + 1]].long())
    longest = max(len(row) for row in ids)
    left = [longest - len(row) for row in ids]
    pad_left = torch.nn.functional.pad
    grid = first["grid"].tolist()

    def named(start: str) -> dict[str, list[Tensor]]:
        return {name.removeprefix(start): values for name, values in pictures.items() if name.startswith(start)}

    return Batch(
        torch.stack([x.float() for x in rows["features"]]),
        (grid[0], grid[1], grid[2]),
        torch.stack([pad_left(row, (n, 0), value=pad) for row, n in zip(ids, left, strict=True)]),
        torch.stack([pad_left(torch.ones_like(row), (n, 0)) for row, n in zip(ids, left, strict=True)]),
        torch.stack([pad_left(row, (n, 0), value=IGNORE) for row, n in zip(labels, left, strict=True)]),
        torch.stack(rows["guide"]),
        torch.cat(rows["top"]),
        torch.cat(rows["top_ids"]),
        step,
        {name: torch.stack([x.float() for x in values]) for name, values in named(SIGNAL).items()},
        {name.removeprefix(PIXELS).strip(): _together(picked, name) for name in first if name.startswith(PIXELS)},
        torch.repeat_interleave(torch.arange(len(picked)), torch.tensor([len(turns) for _, turns in picked])),
        torch.tensor(range(len(ids)) if numbers is None else numbers),
        {name: torch.stack([x.float() for x in values]) for name, values in named(DEEPSTACK).items()},
        {
            name.removeprefix(TYPES): torch.stack([pad_left(x, (n, 0)) for x, n in zip(values, left, strict=True)])
            for name, values in types.items()
        },
        {name: torch.cat(values) for name, values in named(SIZES).items()},
    )


def _together(picked: Sequence[tuple[Outputs, Sequence[int]]], name: str) -> Tensor:
    """The tower's inputs of all pictures; missing tiles are zeros, as processors pad them."""
    rows = [outputs[name] for outputs, _ in picked]
    most = max(row.shape[1] for row in rows) if rows[0].ndim == 5 else 0
    rows = [torch.cat([row, row.new_zeros(1, most - row.shape[1], *row.shape[2:])], 1) if most else row for row in rows]
    return torch.cat([row.float() if row.is_floating_point() else row for row in rows])
