"""Memories of whole images that layers of the language model look back at, beside the sequence and its cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.prompt import Prompt
from lit_reduce.runtime.prompt_map import PromptMap


@dataclass(frozen=True)
class MemoryEntry:
    """The memory of one image.

    Attributes:
        row: Which sample of the batch it belongs to.
        columns: ``[K]``, where its short stream stands in the sequence.
        memory: ``[N, S]``, see `Reduction.memory`.
        assignment: ``[N]``, see `Reduction.assignment`.
        positions: ``[N]`` position ids of its tokens in the full prompt, or ``[R, N]``.
    """

    row: int
    columns: Tensor
    memory: Tensor
    assignment: Tensor
    positions: Tensor


@dataclass(frozen=True)
class ImageMemory:
    """The memories of a batch's images, and which of its tokens query them.

    Attributes:
        pictures: Those that were shortened.
        start: ``[B]``, in the pass that reads the prompt, the column of each sample's first querying token.
        batch: B.
        reducer: The ``id`` of the reducer whose memory it is.
    """

    pictures: list[MemoryEntry]
    start: Tensor
    batch: int
    reducer: int

    @classmethod
    def of(
        cls, model: Any, reducer: Reducer, inputs: Mapping[str, Any], short: dict[str, Any], prompt_map: PromptMap
    ) -> "ImageMemory | None":
        """The memory of a shortened prompt, or None where it has no images that were shortened.

        Args:
            model: The backbone.
            reducer: The reducer that made the memories.
            inputs: Of the full prompt.
            short: What `shorten` returned.
            prompt_map: Likewise.
        """
        if not prompt_map.memories:
            return None
        prompt, ids = Prompt.of(model, short, prompt_map.kept, prompt_map.grids), inputs["input_ids"]
        whole = Prompt.of(model, {"input_ids": ids}, prompt_map.total, prompt_map.grids)
        entries = []
        for i, (memory, assignment) in prompt_map.memories.items():
            row, columns = whole.pictures[i].row, whole.pictures[i].columns
            positions = prompt_map.positions[..., row, columns]
            entries.append(MemoryEntry(row, prompt.pictures[i].columns, memory, assignment, positions))
        return cls(entries, prompt.last, len(ids), id(reducer))

    def moved(self, by: int) -> "ImageMemory":
        """The memory of a prompt with so many more columns before it."""
        pictures = [replace(entry, columns=entry.columns + by) for entry in self.pictures]
        return replace(self, pictures=pictures, start=self.start + by)

    def repeat(self, batch: int) -> "ImageMemory":
        """The memory of a batch whose samples were each repeated, for beams or several answers."""
        times = batch // self.batch
        if times == 1:
            return self
        pictures = [replace(entry, row=entry.row * times + i) for entry in self.pictures for i in range(times)]
        return replace(self, pictures=pictures, start=self.start.repeat_interleave(times), batch=batch)


class PaddedMemory:
    """An `ImageMemory` as padded tensors, all images of a sample behind one another.

    Attributes:
        memory: ``[B, N, S]``.
        real: ``[B, N]``.
        column: ``[B, N]``, where in the sequence the token stands that each one went into; -1 for none.
        cos: ``[B, N, d]``, of its position.
        sin: Likewise.
    """

    def __init__(self, memory: ImageMemory, rotary: Any) -> None:
        rows: list[list[MemoryEntry]] = [
            [entry for entry in memory.pictures if entry.row == row] for row in range(memory.batch)
        ]
        longest = max(sum(len(entry.memory) for entry in row) for row in rows)

        def lay(read: Callable[[MemoryEntry], Tensor], fill: float = 0) -> Tensor:
            some = read(memory.pictures[0])
            out = [torch.cat([read(entry) for entry in row]) if row else some[:0] for row in rows]
            wide = [0, 0] * (some.ndim - 1)
            return torch.stack([torch.nn.functional.pad(x, [*wide, 0, longest - len(x)], value=fill) for x in out])

        self.memory, self.real = (
            lay(lambda entry: entry.memory),
            lay(lambda entry: torch.ones_like(entry.assignment)) > 0,
        )
        self.column = lay(
            lambda entry: entry.columns[entry.assignment.clamp_min(0)].masked_fill(entry.assignment < 0, -1), -1
        )
        positions = lay(lambda entry: entry.positions.movedim(-1, 0))
        # Rows beside the text's, where a family has them: frames, rows and columns of pictures.
        positions = positions if positions.ndim == 2 else positions.movedim(-1, 0)[1:]
        self.cos, self.sin = rotary(self.memory, positions)
