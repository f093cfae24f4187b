"""The batch of a training step: padded prompts, visual tokens and the teacher's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.teacher import PIXELS, SIGNAL, Outputs
from lit_reduce.runtime.encode import IGNORE, Encoded, prompt_text


@dataclass
class Batch:
    """B questions with the teacher's outputs.

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

    def to(self, device: torch.device) -> "Batch":
        """Moves every tensor."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        signals, pixels = ({name: x.to(device) for name, x in held.items()} for held in (self.signals, self.pixels))
        return replace(self, **moved, signals=signals, pixels=pixels)

    @property
    def inputs(self) -> dict[str, Any]:
        """Model inputs; the labels say what no reducer may see."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}

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
        return Encoded(features, [self.grid] * count, list(range(count)), signals, text, text_mask, pictures=pictures)


def make_batch(
    picked: Sequence[tuple[Outputs, Sequence[int]]], step: int = 0, pad: int = 0, numbers: Sequence[int] | None = None
) -> Batch:
    """Collates turns of several groups into one batch.

    Args:
        picked: For each group its teacher outputs and the indices of the turns taken.
        step: Of training.
        pad: Id of padding.
        numbers: Of the questions within the step; by default they are counted.
    """
    ids, labels, rows = [], [], dict[str, list[Tensor]](features=[], guide=[], top=[], top_ids=[])
    signals = {name: list[Tensor]() for name in picked[0][0] if name.startswith(SIGNAL)}
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
            for name, values in signals.items():
                values.append(outputs[name])
            rows["guide"].append(outputs["guide"][t].float())
            rows["top"].append(outputs["top"][answers[t] : answers[t + 1]].float())
            rows["top_ids"].append(outputs["top_ids"][answers[t] : answers[t + 1]].long())
    longest = max(len(row) for row in ids)
    left = [longest - len(row) for row in ids]
    pad_left = torch.nn.functional.pad
    first = picked[0][0]["grid"].tolist()
    return Batch(
        torch.stack(rows["features"]).float(),
        (first[0], first[1], first[2]),
        torch.stack([pad_left(row, (n, 0), value=pad) for row, n in zip(ids, left, strict=True)]),
        torch.stack([pad_left(torch.ones_like(row), (n, 0)) for row, n in zip(ids, left, strict=True)]),
        torch.stack([pad_left(row, (n, 0), value=IGNORE) for row, n in zip(labels, left, strict=True)]),
        torch.stack(rows["guide"]),
        torch.cat(rows["top"]),
        torch.cat(rows["top_ids"]),
        step,
        {name.removeprefix(SIGNAL): torch.stack(values).float() for name, values in signals.items()},
        {name.removeprefix(PIXELS).strip(): _together(picked, name) for name in picked[0][0] if PIXELS in name},
        torch.repeat_interleave(torch.arange(len(picked)), torch.tensor([len(turns) for _, turns in picked])),
        torch.tensor(range(len(ids)) if numbers is None else numbers),
    )


def _together(picked: Sequence[tuple[Outputs, Sequence[int]]], name: str) -> Tensor:
    """The tower's inputs of all pictures; missing tiles are zeros, as processors pad them."""
    rows = [outputs[name] for outputs, _ in picked]
    most = max(row.shape[1] for row in rows) if rows[0].ndim == 5 else 0
    rows = [torch.cat([row, row.new_zeros(1, most - row.shape[1], *row.shape[2:])], 1) if most else row for row in rows]
    return torch.cat([row.float() if row.is_floating_point() else row for row in rows])
