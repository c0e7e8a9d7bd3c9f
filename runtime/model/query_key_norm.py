"""Norms of queries and keys before they are rotated: over each head, or over all heads, of all ranks, at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.runtime.model.attention import OwnHeads
from shardray.runtime.model.kernels.ops import NormWeights
from shardray.runtime.model.spec import Attention, Norm


class QueryKeyNorm:
    """Of the heads of one rank. Legend: T tokens, n / g query and KV heads of this rank, d head size."""

    def __init__(self, attention: Attention, heads: OwnHeads, parameters: Mapping[str, Tensor], comm: Comm) -> None:
        self._spec = attention
        self._heads = heads
        self._num_heads = len(heads.kv_of_head)
        self._comm = comm
        self._q = self._weights("q_norm", attention.q_norm, parameters)
        self._k = self._weights("k_norm", attention.k_norm, parameters)

    @classmethod
    def of(
        cls, attention: Attention, heads: OwnHeads, parameters: Mapping[str, Tensor], comm: Comm
    ) -> QueryKeyNorm | None:
        """None where nothing is normalized."""
        has_any = attention.q_norm is not None or attention.k_norm is not None
        return cls(attention, heads, parameters, comm) if has_any else None

    def __call__(self, qkv: Tensor) -> Tensor:
        """(T, n + 2 g, d) -> the same, queries and keys normalized"""
        num_kv_heads = (qkv.shape[1] - self._num_heads) // 2
        queries, keys, values = torch.split(qkv, [self._num_heads, num_kv_heads, num_kv_heads], dim=1)
        if self._spec.norm_over == "all":
            queries, keys = self._over_all(queries, keys)
        else:
            queries = queries if self._q is None else self._q(queries)
            keys = keys if self._k is None else self._k(keys)
        return torch.cat((queries, keys, values), dim=1)

    def _over_all(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """RMS over the heads of all ranks; a KV head that two ranks hold counts once."""
        assert self._q is not None
        assert self._k is not None
        squares = torch.stack(
            [
                queries.float().square().sum((1, 2)),
                keys[:, self._heads.first_new_kv_head :].float().square().sum((1, 2)),
            ],
            dim=1,
        )
        squares = self._comm.all_reduce(squares)
        of_queries, of_keys = squares.unbind(dim=1)
        of_queries = of_queries / (self._spec.num_heads * self._spec.head_dim)
        of_keys = of_keys / (self._spec.num_kv_heads * self._spec.head_dim)
        return self._scale(queries, of_queries, self._q), self._scale(keys, of_keys, self._k)

    def _scale(self, x: Tensor, mean: Tensor, weights: NormWeights) -> Tensor:
        assert weights.weight is not None
        inverse = torch.rsqrt(mean + weights.norm.eps)[:, None, None]
        return (x.float() * inverse * weights.weight).to(x.dtype)

    def _weights(self, name: str, norm: Norm | None, parameters: Mapping[str, Tensor]) -> NormWeights | None:
        if norm is None:
            return None
        if self._spec.norm_over == "all":
            parameters = {f"{name}.weight": parameters[f"{name}.weight"].view(-1, self._spec.head_dim)}
        return NormWeights.of(norm, name, parameters)
