"""The blocks of a decoder: norms, rotary positions, activations, one layer. All that a DecoderSpec can ask for.

Legend: T tokens of the step, H hidden size, n / g query and KV heads of this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import ColumnParallelLinear, RowParallelLinear
from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.spec import Activation, DecoderSpec, Mlp, Norm

Parameters = Mapping[str, Tensor]


def make_norm(norm: Norm, name: str, parameters: Parameters) -> Callable[[Tensor], Tensor]:
    """(T, H) -> (T, H), computed in float32, returned in the input's dtype."""
    weight = parameters[f"{name}.weight"].float()
    shape, eps = tuple(weight.shape), norm.eps
    if norm.kind == "rms":
        return lambda x: F.rms_norm(x.float(), shape, weight, eps).to(x.dtype)
    bias = parameters[f"{name}.bias"].float()
    return lambda x: F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of each head of (T, n, d) by (T, 1, dim // 2) angles, in float32."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.float(), second.float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class AttentionBlock:
    """q, k, v in one product; rotary; the pages; the output projection, summed over ranks."""

    def __init__(self, spec: DecoderSpec, kv_of_head: tuple[int, ...], parameters: Parameters, comm: Comm) -> None:
        self._head_dim = spec.attention.head_dim
        names = ("q", "k", "v")
        biases = [parameters[f"{name}.bias"] for name in names] if spec.attention.qkv_bias else None
        self._qkv = ColumnParallelLinear.merged([parameters[f"{name}.weight"] for name in names], biases)
        self._out = RowParallelLinear(parameters["o.weight"], parameters.get("o.bias"), comm)
        self._num_heads = len(kv_of_head)
        self._num_kv_heads = parameters["k.weight"].shape[0] // self._head_dim
        self._attend = PagedAttention(spec.attention, kv_of_head, parameters["o.weight"].device)
        self.num_bytes = self._qkv.num_bytes + self._out.num_bytes

    def __call__(
        self, x: Tensor, layer: int, pages: KVPages, view: StepView, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(T, H) -> (T, H)"""
        num_heads = self._num_heads + 2 * self._num_kv_heads
        qkv = self._qkv(x).view(x.shape[0], num_heads, self._head_dim)  # (T, n + 2 g, d)
        queries, keys, values = qkv.split([self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if angles is not None:
            turned = apply_rotary(qkv[:, : self._num_heads + self._num_kv_heads], *angles)
            queries, keys = turned.split([self._num_heads, self._num_kv_heads], dim=1)
        pages.write(layer, keys, values, view.cache_index)
        attended = self._attend(queries, pages, layer, view)
        return self._out(attended.reshape(x.shape[0], self._num_heads * self._head_dim))


class MlpBlock:
    """Gated or not; gate and up in one product."""

    def __init__(self, mlp: Mlp, parameters: Parameters, comm: Comm) -> None:
        names = ("gate", "up") if mlp.gated else ("up",)
        biases = [parameters[f"{name}.bias"] for name in names] if mlp.up_bias else None
        self._in = ColumnParallelLinear.merged([parameters[f"{name}.weight"] for name in names], biases)
        self._out = RowParallelLinear(parameters["down.weight"], parameters.get("down.bias"), comm)
        self._activation = _ACTIVATIONS[mlp.activation]
        self._gated = mlp.gated
        self.num_bytes = self._in.num_bytes + self._out.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)"""
        inner = self._in(x)
        if self._gated:
            gate, up = inner.chunk(2, dim=-1)
            return self._out(self._activation(gate).mul_(up))
        return self._out(self._activation(inner))


class DecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(self, spec: DecoderSpec, kv_of_head: tuple[int, ...], parameters: Parameters, comm: Comm) -> None:
        self._attention_norm = make_norm(spec.norm, "attention_norm", parameters)
        self._attention = AttentionBlock(spec, kv_of_head, parameters, comm)
        self._mlp_norm = make_norm(spec.norm, "mlp_norm", parameters)
        self._mlp = MlpBlock(spec.mlp, parameters, comm)
        self.num_bytes = self._attention.num_bytes + self._mlp.num_bytes

    def __call__(
        self, x: Tensor, layer: int, pages: KVPages, view: StepView, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(T, H) -> (T, H)"""
        x = x + self._attention(self._attention_norm(x), layer, pages, view, angles)
        return x + self._mlp(self._mlp_norm(x))
