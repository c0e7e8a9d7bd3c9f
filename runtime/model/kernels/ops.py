"""The operations of a layer besides its matrix products, as torch calls: right on every device, fast on none.

Legend: T tokens, H hidden size, n / g query and KV heads of this rank, d head size. A faster set of operations
subclasses this one, overrides what it does better, and must give the same results up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.spec import Activation, Norm

Angles = tuple[Tensor, Tensor]  # cosines and sines, each (T, dim // 2) float32

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class NormWeights:
    """A norm and its float32 weights."""

    norm: Norm
    weight: Tensor  # (H,)
    bias: Tensor | None


class Ops:
    """The reference set."""

    def add_norm(self, norm: NormWeights, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm(x + delta)), each (T, H); the norm is computed in float32. May write into ``x``."""
        if delta is not None:
            x = x + delta
        shape, eps = tuple(norm.weight.shape), norm.norm.eps
        if norm.norm.kind == "rms":
            return x, F.rms_norm(x.float(), shape, norm.weight, eps).to(x.dtype)
        return x, F.layer_norm(x.float(), shape, norm.weight, norm.bias, eps).to(x.dtype)

    def rotate_and_store(
        self, qkv: Tensor, num_heads: int, angles: Angles | None, pages: KVPages, layer: int, view: StepView
    ) -> Tensor:
        """Take (T, n + 2 g, d), rotate queries and keys, store keys and values in the pages; queries (T, n, d)."""
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        turned, values = torch.split(qkv, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if angles is not None:
            turned = apply_rotary(turned, angles)
        queries: Tensor
        queries, keys = torch.split(turned, [num_heads, num_kv_heads], dim=1)
        pages.write(layer, keys, values, view.cache_index)
        return queries

    def attend(self, attention: PagedAttention, queries: Tensor, pages: KVPages, layer: int, view: StepView) -> Tensor:
        """(T, n, d) -> (T, n, d): every token attends to its sequence up to itself."""
        return attention(queries, pages, layer, view)

    def activate(self, inner: Tensor, activation: Activation, gated: bool) -> Tensor:
        """act(inner), or for gated MLPs (T, 2 F) -> (T, F): act(first half) * second half."""
        if not gated:
            return _ACTIVATIONS[activation](inner)
        gate, up = inner.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate).mul_(up)


def apply_rotary(x: Tensor, angles: Angles) -> Tensor:
    """Rotate the first 2 * (dim // 2) elements of each head of (T, heads, d), in float32."""
    cos, sin = angles[0][:, None], angles[1][:, None]
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.float(), second.float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
