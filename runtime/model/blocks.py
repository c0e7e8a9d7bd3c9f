"""The blocks of a decoder: attention, MLP, one layer. All that a DecoderSpec can ask for.

A layer passes on the residual and what is still to be added to it, so that the addition joins the next norm.

Legend: T tokens of the step, H hidden size, n / g query and KV heads of this rank, d head size.
"""

from __future__ import annotations

from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import ColumnParallelLinear, RowParallelLinear
from shardray.runtime.model.attention import KVPages, OwnHeads, PagedAttention, PromptsView, StepView
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.latent import LatentProjections
from shardray.runtime.model.mlp import ExpertsBlock, OwnExperts, mlp_block
from shardray.runtime.model.query_key_norm import QueryKeyNorm
from shardray.runtime.model.spec import Attention, Layer, Norm, Norms
from shardray.runtime.model.weights import Parameters, below, weight_of

Pending = tuple[Tensor, Tensor | None]  # the residual (T, H), and what is to be added to it


class AttentionBlock:
    """q, k, v in one product; their norms; rotary; the pages; the output projection, summed over ranks."""

    def __init__(self, attention: Attention, heads: OwnHeads, parameters: Parameters, comm: Comm, ops: Ops) -> None:
        self._ops = ops
        self._spec = attention
        self._qkv = _projections(attention, parameters)
        self._norm = None if attention.latent is not None else QueryKeyNorm.of(attention, heads, parameters, comm)
        self._value_dim = attention.head_dim if attention.latent is None else attention.latent.value_dim
        self._out = RowParallelLinear(weight_of(parameters, "o"), parameters.get("o.bias"), comm)
        self._num_heads = len(heads.kv_of_head)
        self._attention = PagedAttention(
            attention, heads, self._out.device, parameters.get("sinks"), parameters.get("relative.weight")
        )

    def __call__(self, x: Tensor, layer: int, pages: KVPages, view: StepView, angles: Angles | None) -> Tensor:
        """(T, H) -> (T, H)"""
        qkv = self._qkv(x).view(x.shape[0], -1, self._spec.head_dim)  # (T, n + 2 g, d)
        if self._norm is not None:
            qkv = self._norm(qkv)
        if self._spec.clip is not None:
            qkv = qkv.clamp_(-self._spec.clip, self._spec.clip)
        queries = self._ops.rotate_and_store(qkv, self._num_heads, angles, pages, layer, view)
        attended = self._ops.attend(self._attention, queries, pages, layer, view)
        if self._value_dim < self._spec.head_dim:
            attended = attended[..., : self._value_dim]
        return self._out(attended.reshape(x.shape[0], self._num_heads * self._value_dim))


def _projections(attention: Attention, parameters: Parameters) -> ColumnParallelLinear | LatentProjections:
    """What makes a token's queries, keys and values of this rank's heads, in this order."""
    if attention.latent is not None:
        return LatentProjections(attention, attention.latent, parameters)
    return _merged(attention, parameters, "q", "k", "v")


def _merged(attention: Attention, parameters: Parameters, *names: str) -> ColumnParallelLinear:
    """Several projections of one input"""
    biases = [parameters[f"{name}.bias"] for name in names] if attention.qkv_bias else None
    return ColumnParallelLinear.merged([weight_of(parameters, name) for name in names], biases)


class CrossAttentionBlock:
    """Queries of a decoder's tokens, against keys and values of what the encoder gave, in pages of the prompt."""

    def __init__(self, attention: Attention, heads: OwnHeads, parameters: Parameters, comm: Comm, ops: Ops) -> None:
        self._ops = ops
        self._head_dim = attention.head_dim
        self._queries = _merged(attention, parameters, "q")
        self._keys_and_values = _merged(attention, parameters, "k", "v")
        self._out = RowParallelLinear(weight_of(parameters, "o"), parameters.get("o.bias"), comm)
        self._attention = PagedAttention(attention, heads, self._out.device)

    def remember(self, encoded: Tensor, layer: int, pages: KVPages, prompts: PromptsView) -> None:
        """Store what (S, H) of the encoder are to this layer."""
        both = self._keys_and_values(encoded).view(encoded.shape[0], -1, self._head_dim)
        keys, values = both.chunk(2, dim=1)
        pages.write(layer, keys, values, prompts.cache_index)

    def __call__(self, x: Tensor, layer: int, pages: KVPages, prompts: PromptsView) -> Tensor:
        """(T, H) -> (T, H)"""
        queries = self._queries(x).view(x.shape[0], -1, self._head_dim)
        attended = self._ops.attend(self._attention, queries, pages, layer, prompts.seen)
        return self._out(attended.reshape(x.shape[0], -1))


class _Around:
    """What stands around a block: norms before it, on what it gives, and after the sum; the scale of what it gives."""

    def __init__(self, name: str, norms: Norms, scale: float, parameters: Parameters, ops: Ops) -> None:
        def weights(place: str, norm: Norm | None) -> NormWeights | None:
            return None if norm is None else NormWeights.of(norm, f"{name}_norm.{place}", parameters)

        self._before = weights("before", norms.before)
        self._inner = weights("inner", norms.inner)
        self._after = weights("after", norms.after)
        self._scale = scale
        self._ops = ops

    def enter(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual, and what the block reads"""
        if self._before is not None:
            return self._ops.add_norm(self._before, x, delta)
        x = x if delta is None else x + delta
        return x, x

    def leave(self, x: Tensor, delta: Tensor) -> Pending:
        """The residual, and what is to be added to it"""
        if self._inner is not None:
            delta = self._inner(delta)
        if self._scale != 1.0:
            delta = delta * self._scale
        return (x, delta) if self._after is None else (self._ops.add_norm(self._after, x, delta)[1], None)


class DecoderLayer:
    """Attention and MLP, one after the other or side by side; cross-attention between them. An encoder's as well."""

    def __init__(
        self, layer: Layer, heads: OwnHeads, experts: OwnExperts, parameters: Parameters, comm: Comm, ops: Ops
    ) -> None:
        scale = layer.residual_scale
        self._around_attention = _Around("attention", layer.attention_norms, scale, parameters, ops)
        self._attention = AttentionBlock(layer.attention, heads, parameters, comm, ops)
        self._cross: CrossAttentionBlock | None = None
        if layer.cross is not None:
            self._around_cross = _Around("cross", layer.cross_norms, scale, parameters, ops)
            self._cross = CrossAttentionBlock(layer.cross, heads, below("cross.", parameters), comm, ops)
        self._around_mlp = _Around("mlp", layer.mlp_norms, scale, parameters, ops)
        self._mlp = mlp_block(layer.mlp, experts, parameters, comm, ops)
        self.experts = self._mlp if isinstance(self._mlp, ExpertsBlock) else None
        self._parallel = layer.parallel
        self._shares_norm = layer.mlp_norms.before is None
        self.rotary = layer.attention.rotary

    def remember(self, encoded: Tensor, layer: int, pages: KVPages, prompts: PromptsView) -> None:
        """Take in what the encoder gave, (S, H), for cross-attention."""
        assert self._cross is not None
        self._cross.remember(encoded, layer, pages, prompts)

    def __call__(
        self, x: Tensor, delta: Tensor | None, layer: int, pages: KVPages, view: StepView, angles: Angles | None
    ) -> Pending:
        """The residual (T, H) and what is to be added to it, in and out."""
        x, normed = self._around_attention.enter(x, delta)
        attended = self._attention(normed, layer, pages, view, angles)
        if self._parallel:
            read = normed if self._shares_norm else self._around_mlp.enter(x, None)[1]
            return self._around_attention.leave(x, attended + self._mlp(read))
        x, delta = self._around_attention.leave(x, attended)
        if self._cross is not None:
            assert view.prompts is not None
            x, normed = self._around_cross.enter(x, delta)
            x, delta = self._around_cross.leave(x, self._cross(normed, layer, pages, view.prompts))
        x, normed = self._around_mlp.enter(x, delta)
        return self._around_mlp.leave(x, self._mlp(normed))
