"""What is seen and what is said share one vocabulary: a patch is the sum of the words for what it shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_reduce_pocket.labels import FIELDS, SIZES
from lit_reduce_pocket.model import sincos
from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import GRID

HEAD = 64  # width of a decoder head
READS = 5  # guided heads whose output shall say where a thing is
TALLIES, MOST = 2, 8  # guided heads whose output shall say how many things there are, and how many there may be


class Symbols(nn.Module):
    """Turns patch labels into embeddings: the words of what the patch shows, plus where it is."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.place = nn.Embedding(2 * GRID, width)  # rows, then columns
        self.extra = nn.Embedding(4, width)  # what has no word of its own: background, chart, centre; one spare
        self.spots = nn.ModuleList(nn.Linear(HEAD, 2) for _ in range(READS))  # read-outs of guided heads
        with torch.no_grad():  # waves, so that left and right, above and below are directions from the start
            rows, columns = sincos(GRID, width).reshape(GRID, GRID, 2, width // 2).unbind(2)
            waves = torch.zeros(2, GRID, 2, width // 2)
            waves[0, :, 0], waves[1, :, 1] = rows[:, 0], columns[0]
            self.place.weight.copy_(0.07 * waves.reshape(2 * GRID, width))
        self.tallies = nn.ModuleList(nn.Linear(HEAD, MOST + 1) for _ in range(TALLIES))
        nn.init.normal_(self.extra.weight, std=0.03)
        pieces = {p: i for i, p in enumerate(vocabulary())}
        for field, names in FIELDS.items():
            ids = [pieces.get(("##" if field == "second" else "") + n, -1) for n in names]
            self.register_buffer(f"ids_{field}", torch.tensor(ids), persistent=False)

    def forward(self, embedding: nn.Embedding, labels: dict[str, Tensor], where: Tensor) -> Tensor:
        """Embeds labels {field: [B, P]} of the patches at raster indices `where` [B, P] as [B, P, D]."""
        out: Tensor = self.place(where // GRID) + self.place(GRID + where % GRID)
        for field in FIELDS:
            ids = getattr(self, f"ids_{field}")[labels[field]]
            some = (labels[field] > 0) & (ids >= 0)
            out = out + embedding(ids.clamp(min=0)) * some[..., None]
        kind = labels["kind"]
        out = out + self.extra.weight[0] * (kind == 0)[..., None]
        out = out + self.extra.weight[1] * (kind == SIZES["kind"] - 1)[..., None]
        return out + self.extra.weight[2] * (labels["centre"] > 0)[..., None]
