"""The slow reference for registers: patches and registers in one sequence, under a mask, in double precision."""

import copy
import math

import torch

from lit_reduce.backbones.towers import tower_of
from lit_reduce.ops.cells import cells
from lit_reduce.reducer import Reducer


class Slow:
    """One picture's tiles through the tower: patches and registers in one sequence, under an explicit mask."""

    def __init__(self, tiny, reducer: Reducer, keep: int):
        self.tower, self.keep = tower_of(tiny.model), keep
        self.blocks = [copy.deepcopy(block).double() for block in self.tower.blocks[: self.tower.depth]]
        for block in self.blocks:
            for module in block.modules():
                vars(module).pop("forward", None)
        self.projector = copy.deepcopy(tiny.model.base_model.multi_modal_projector).double()
        vars(self.projector).pop("forward", None)
        self.weights = {name: weight.double() for name, weight in reducer.state_dict().items()}
        self.config = reducer.config
        self.first = round(self.config.start * self.tower.depth)

    def update(self, name, x, y):
        where = name if name == "say" else f"updates.{name}"
        down, up = (self.weights.get(f"{where}.{part}.weight") for part in ("down", "up"))
        if down is None:
            return y
        rows = []
        for row, plain in zip(x, y, strict=True):
            small = down @ (row / (row.square().mean() + 1e-6).sqrt())
            if name == "say" or name.endswith("mlp"):
                small = small * (1 + torch.erf(small / math.sqrt(2))) / 2
            rows.append(plain + plain.square().mean().sqrt() * (up @ small))
        return torch.stack(rows)

    def start(self, patches):
        """By loops: the mean of each cell, and the tables read at its middle by hand."""
        side = math.isqrt(len(patches))
        kept_indices, owner = cells((1, side, side), len(patches), self.keep)
        rows = []
        for cell in range(self.keep):
            inside = [n for n in range(len(patches)) if owner[n] == cell]
            mean = sum(patches[n] for n in inside) / len(inside)
            x = sum(n % side + 0.5 for n in inside) / len(inside) / side
            y = sum(n // side + 0.5 for n in inside) / len(inside) / side
            delta = self.table("place", x, y) + math.log2(64 * len(inside) / len(patches)) * self.table("size", x, y)
            rows.append(mean + mean.square().mean().sqrt() * delta)
        return torch.stack(rows), kept_indices

    def table(self, name, x, y):
        table, out = self.weights[name], 0
        count = table.shape[-1]
        for row in range(count):
            for column in range(count):
                across = min(max(x * count - 0.5, 0), count - 1) - column
                down = min(max(y * count - 0.5, 0), count - 1) - row
                out = out + max(0, 1 - abs(across)) * max(0, 1 - abs(down)) * table[:, row, column]
        return out

    def attend(self, block, number, x, patches):
        part, seen = block.self_attn, block.layer_norm1(x)
        heads = []
        projected = {}
        for name, linear in (("q", part.q_proj), ("k", part.k_proj), ("v", part.v_proj)):
            y = linear(seen)
            y[patches:] = self.update(f"{number}_{name}", seen[patches:], y[patches:]) if len(y) > patches else y[:0]
            projected[name] = y.unflatten(-1, (part.num_heads, -1))
        hidden = torch.zeros(len(x), len(x), dtype=torch.bool)
        hidden[:patches, patches:] = True
        for head in range(part.num_heads):
            q, k, v = (projected[name][:, head] for name in "qkv")
            shown = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            heads.append(shown @ v)
        read = torch.cat(heads, -1)
        out = part.out_proj(read)
        if len(out) > patches:
            out[patches:] = self.update(f"{number}_o", read[patches:], out[patches:])
        return out

    def between(self, number, x):
        """Registers ``[R, C]`` of all tiles of one picture."""
        ask, leave = (self.weights[f"between.{number}.{part}.weight"] for part in ("ask", "leave"))
        even = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        q, k, v = (even @ ask.T).chunk(3, -1)
        read = []
        for one_q, one_k, one_v in zip(*(y.chunk(self.config.heads, -1) for y in (q, k, v)), strict=True):
            read.append((one_q @ one_k.T * one_q.shape[-1] ** -0.5).softmax(-1) @ one_v)
        return x + x.square().mean(-1, keepdim=True).sqrt() * (torch.cat(read, -1) @ leave.T)

    def __call__(self, tiles):
        """``[tiles, S, C]`` before the first block; the projected registers ``[tiles, K, D]`` and their anchors."""
        prefix, patches = self.tower.prefix, tiles.shape[1]
        x = [tile.double() for tile in tiles]
        for number, block in enumerate(self.blocks):
            if number == self.first:
                started = [self.start(tile[prefix:]) for tile in x]
                x = [torch.cat([tile, rows]) for tile, (rows, _) in zip(x, started, strict=True)]
            out = [self.attend(block, number, tile, patches) for tile in x]
            if number >= self.first and len(x) > 1 and self.config.reatten:
                shared = self.between(number, torch.cat([tile[patches:] for tile in out])).split(self.keep)
                out = [torch.cat([tile[:patches], rows]) for tile, rows in zip(out, shared, strict=True)]
            x = [tile + more for tile, more in zip(x, out, strict=True)]
            for i, tile in enumerate(x):
                seen = block.layer_norm2(tile)
                y = block.mlp(seen)
                y[patches:] = self.update(f"{number}_mlp", seen[patches:], y[patches:]) if len(y) > patches else y[:0]
                x[i] = tile + y
        return torch.stack([self.leave(tile[prefix:patches], tile[patches:]) for tile in x]), started[0][1]

    def leave(self, patches, rows):
        projected, owner = self.projector(patches), cells((1, 6, 6), 36, self.keep)[1]
        pooled = torch.stack([projected[owner == cell].mean(0) for cell in range(self.keep)])
        return self.update("say", rows, pooled + self.weights["mix"] * (self.projector(rows) - pooled))
