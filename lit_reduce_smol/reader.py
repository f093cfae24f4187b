"""A frozen Llama with low-rank updates, written out for training on CPUs.

It computes what `LlamaForCausalLM` computes. Three things make it fast: the update is added to the weights once a step
(``W + scale * B A``) instead of being multiplied on every token, query, key and value (gate and up) are one product
with one update, and logits are computed where an answer is predicted and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

from lit_reduce_smol.packed import OPEN, Batch, encode

RANKS = {"qkv": 32, "o": 16, "gate_up": 32, "down": 16}
SCALE = 2.0
SOURCES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
"""The matrices of a layer that share a product."""


class _Product(torch.autograd.Function):
    """``x (W + scale B A)^T``; the gradient of A and B goes through rank-sized products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        whole = torch.addmm(weight, b, a, alpha=SCALE)
        ctx.save_for_backward(x, whole, a, b)
        return linear(x, whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, whole, a, b = ctx.saved_tensors
        flat, grad = x.flatten(0, -2), grads[0].flatten(0, -2)
        to_b, to_a = linear(flat, a), grad @ b
        return (grad @ whole).view_as(x), None, SCALE * (to_a.T @ flat), SCALE * (grad.T @ to_b)


class Layer(nn.Module):
    """One layer: frozen matrices as buffers, updates as parameters."""

    norm_1: Tensor
    norm_2: Tensor

    def __init__(self, source: Any, config: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.groups, self.eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        self.register_buffer("norm_1", source.input_layernorm.weight.detach().clone(), persistent=False)
        self.register_buffer("norm_2", source.post_attention_layernorm.weight.detach().clone(), persistent=False)
        for name, paths in SOURCES.items():
            weight = torch.cat([source.get_submodule(path).weight.detach() for path in paths])
            self.register_buffer(name, weight, persistent=False)
            rank = min(RANKS[name], *weight.shape)
            a = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            setattr(self, f"{name}_a", nn.Parameter(a))
            setattr(self, f"{name}_b", nn.Parameter(torch.zeros(weight.shape[0], rank)))

    def product(self, name: str, x: Tensor) -> Tensor:
        """``x`` times an updated matrix."""
        out: Tensor = _Product.apply(x, getattr(self, name), getattr(self, f"{name}_a"), getattr(self, f"{name}_b"))
        return out

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``[B, L, D]`` in and out; ``mask`` ``[B, 1, L, L]`` is added to the scores."""
        B, L, D = x.shape
        q, k, v = self.qkv_of(nn.functional.rms_norm(x, (D,), self.norm_1, self.eps))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.product("o", seen.transpose(1, 2).reshape(B, L, -1))
        gate, up = self.product("gate_up", nn.functional.rms_norm(x, (D,), self.norm_2, self.eps)).chunk(2, -1)
        return x + self.product("down", silu(gate) * up)

    def qkv_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, heads, L, d]``, keys and values ``[B, groups, L, d]``."""
        every = self.product("qkv", x).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)
        q, k, v = every.split([self.heads, self.groups, self.groups], 1)
        return q, k, v


class Reader(nn.Module):
    """The language model that reads visual tokens.

    Args:
        language: A `LlamaForCausalLM`; its weights are copied and stay as they are.
        tokenizer: Its tokenizer.
        seed: Of the updates.
    """

    table: Tensor
    head: Tensor
    norm: Tensor

    def __init__(self, language: Any, tokenizer: Any, seed: int = 0) -> None:
        super().__init__()
        config = language.config
        g = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(Layer(layer, config, g) for layer in language.model.layers)
        self.register_buffer("table", language.model.embed_tokens.weight.detach().clone(), persistent=False)
        self.register_buffer("head", language.lm_head.weight.detach(), persistent=False)
        self.register_buffer("norm", language.model.norm.weight.detach().clone(), persistent=False)
        self.rotary, self.eps = language.model.rotary_emb, config.rms_norm_eps
        self.opening = torch.tensor(encode(tokenizer, OPEN))
        self.behind = torch.tensor(encode(tokenizer, "\n"))

    def forward(self, visual: Tensor, batch: Batch) -> Tensor:
        """The loss of each target ``[T]``, given visual tokens ``[B, N, D]``."""
        B = len(visual)
        opening, behind = (self.table[ids].expand(B, -1, -1) for ids in (self.opening, self.behind))
        x = torch.cat([opening, visual, behind, self.table[batch.ids]], 1)
        prefix, L = x.shape[1] - batch.ids.shape[1], x.shape[1]
        positions = torch.cat([torch.arange(prefix).expand(B, -1), prefix + batch.positions], 1)
        cos, sin = (t[:, None] for t in self.rotary(x, positions))
        sees = torch.ones(L, L, dtype=torch.bool).tril().repeat(B, 1, 1)
        sees[:, prefix:, prefix:] = batch.seen
        mask = torch.zeros(B, 1, L, L).masked_fill_(~sees[:, None], float("-inf"))
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = x[:, prefix:].flatten(0, 1)[batch.sources]
        x = nn.functional.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        return cross_entropy(linear(x, self.head), batch.targets, reduction="none")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def fold(language: Any, trained: Mapping[str, Tensor]) -> None:
    """Add trained updates to the layers of a Llama (in place), in float64: the same weights on every machine.

    Args:
        language: A `LlamaModel`.
        trained: ``layers.N.NAME_a`` and ``layers.N.NAME_b``, as `Reader` names them.
    """
    with torch.no_grad():
        for i, layer in enumerate(language.layers):
            for name, paths in SOURCES.items():
                a, b = (trained[f"layers.{i}.{name}_{side}"].double() for side in "ab")
                modules = [layer.get_submodule(path) for path in paths]
                parts = (SCALE * (b @ a)).split([m.weight.shape[0] for m in modules])
                for module, part in zip(modules, parts, strict=True):
                    module.weight.copy_(module.weight.double() + part)
