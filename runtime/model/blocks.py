"""The blocks of a decoder: attention, MLP, one layer. All that a DecoderSpec can ask for.

A layer passes on the residual and what is still to be added to it, so that the addition joins the next norm.

Legend: T tokens of the step, H hidden size, n / g query and KV heads of this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import ColumnParallelLinear, RowParallelLinear
from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.spec import DecoderSpec, Mlp, Norm

Parameters = Mapping[str, Tensor]


def norm_weights(norm: Norm, name: str, parameters: Parameters) -> NormWeights:
    bias = parameters[f"{name}.bias"].float() if norm.kind == "layer" else None
    return NormWeights(norm, parameters[f"{name}.weight"].float(), bias)


class AttentionBlock:
    """q, k, v in one product; rotary; the pages; the output projection, summed over ranks."""

    def __init__(
        self, spec: DecoderSpec, kv_of_head: tuple[int, ...], parameters: Parameters, comm: Comm, ops: Ops
    ) -> None:
        self._ops = ops
        self._head_dim = spec.attention.head_dim
        names = ("q", "k", "v")
        biases = [parameters[f"{name}.bias"] for name in names] if spec.attention.qkv_bias else None
        self._qkv = ColumnParallelLinear.merged([parameters[f"{name}.weight"] for name in names], biases)
        self._out = RowParallelLinear(parameters["o.weight"], parameters.get("o.bias"), comm)
        self._num_heads = len(kv_of_head)
        self._total_heads = self._qkv.out_size // self._head_dim
        self._attention = PagedAttention(spec.attention, kv_of_head, parameters["o.weight"].device)
        self.num_bytes = self._qkv.num_bytes + self._out.num_bytes

    def __call__(self, x: Tensor, layer: int, pages: KVPages, view: StepView, angles: Angles | None) -> Tensor:
        """(T, H) -> (T, H)"""
        qkv = self._qkv(x).view(x.shape[0], self._total_heads, self._head_dim)  # (T, n + 2 g, d)
        queries = self._ops.rotate_and_store(qkv, self._num_heads, angles, pages, layer, view)
        attended = self._ops.attend(self._attention, queries, pages, layer, view)
        return self._out(attended.reshape(x.shape[0], self._num_heads * self._head_dim))


class MlpBlock:
    """Gated or not; gate and up in one product."""

    def __init__(self, mlp: Mlp, parameters: Parameters, comm: Comm, ops: Ops) -> None:
        names = ("gate", "up") if mlp.gated else ("up",)
        biases = [parameters[f"{name}.bias"] for name in names] if mlp.up_bias else None
        self._ops = ops
        self._mlp = mlp
        self._in = ColumnParallelLinear.merged([parameters[f"{name}.weight"] for name in names], biases)
        self._out = RowParallelLinear(parameters["down.weight"], parameters.get("down.bias"), comm)
        self.num_bytes = self._in.num_bytes + self._out.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)"""
        return self._out(self._ops.activate(self._in(x), self._mlp.activation, self._mlp.gated))


class DecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(
        self, spec: DecoderSpec, kv_of_head: tuple[int, ...], parameters: Parameters, comm: Comm, ops: Ops
    ) -> None:
        self._ops = ops
        self._attention_norm = norm_weights(spec.norm, "attention_norm", parameters)
        self._attention = AttentionBlock(spec, kv_of_head, parameters, comm, ops)
        self._mlp_norm = norm_weights(spec.norm, "mlp_norm", parameters)
        self._mlp = MlpBlock(spec.mlp, parameters, comm, ops)
        self.num_bytes = self._attention.num_bytes + self._mlp.num_bytes

    def __call__(
        self, x: Tensor, delta: Tensor | None, layer: int, pages: KVPages, view: StepView, angles: Angles | None
    ) -> tuple[Tensor, Tensor]:
        """The residual (T, H) and what is to be added to it, in and out."""
        x, normed = self._ops.add_norm(self._attention_norm, x, delta)
        delta = self._attention(normed, layer, pages, view, angles)
        x, normed = self._ops.add_norm(self._mlp_norm, x, delta)
        return x, self._mlp(normed)
