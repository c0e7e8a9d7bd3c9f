"""The operations of a layer besides its matrix products, as torch calls: right on every device, fast on none.

Legend: T tokens, H hidden size, n / g query and KV heads of this rank, d head size. A faster set of operations
subclasses this one, overrides what it does better, and must give the same results up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.rows import take_rows
from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.spec import Activation, Norm


class Angles(NamedTuple):
    """Of rotary positions, one row a token or position."""

    cos: Tensor  # (T, dim // 2) float32
    sin: Tensor
    interleaved: bool = False  # which elements are a pair: see Rotary

    def at(self, positions: Tensor) -> Angles:
        return Angles(take_rows(self.cos, positions), take_rows(self.sin, positions), self.interleaved)

    def to(self, device: torch.device) -> Angles:
        return Angles(self.cos.to(device), self.sin.to(device), self.interleaved)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class NormWeights:
    """A norm and its float32 weights."""

    norm: Norm
    weight: Tensor | None  # (H,), the offset added
    bias: Tensor | None

    @classmethod
    def of(cls, norm: Norm, name: str, parameters: Mapping[str, Tensor]) -> NormWeights:
        """Those of the norm of that name."""
        weight = parameters[f"{name}.weight"].float() + norm.offset if norm.has_weight else None
        return cls(norm, weight, parameters[f"{name}.bias"].float() if norm.has_bias else None)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H), computed in float32"""
        shape, eps = (x.shape[-1],), self.norm.eps
        if self.norm.kind == "rms":
            normed = F.rms_norm(x.float(), shape, None, eps)
        else:
            normed = F.layer_norm(x.float(), shape, None, None, eps)
        if self.weight is not None:
            normed = normed * self.weight  # which may be one per head: wider than what is normalized
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


class Ops:
    """The reference set."""

    def add_norm(self, norm: NormWeights, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm(x + delta)), each (T, H); the norm is computed in float32. May write into ``x``."""
        if delta is not None:
            x = x + delta
        return x, norm(x)

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta, (T, H), in memory of its own."""
        return x + delta

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
        if activation == "clamped_swiglu":
            return clamped_swiglu(gate, up)
        return _ACTIVATIONS[activation](gate).mul_(up)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 * gate), with gate at most 7 and up within -7 .. 7 (gpt-oss)."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def apply_rotary(x: Tensor, angles: Angles) -> Tensor:
    """Rotate the first 2 * (dim // 2) elements of each head of (T, heads, d), in float32."""
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim].float(), x[..., dim:]
    if angles.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(parts, dim=-1).flatten(-2) if angles.interleaved else torch.cat(parts, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1) if rest.shape[-1] else rotated.to(x.dtype)
