"""Multi-head latent attention: queries, keys and values of one rank's heads, out of the narrow vectors of a token.

Keys and values are stored for each head, as for any attention. What is rotated comes first in a head here, and last in
the checkpoint; scores do not mind, as long as queries and keys agree.

Legend: T tokens, n heads of this rank, d = rotary + plain elements of a query or key.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.layers import ColumnParallelLinear, Linear
from shardray.runtime.model.kernels.ops import NormWeights
from shardray.runtime.model.spec import Attention, Latent
from shardray.runtime.model.weights import weight_of


class LatentProjections:
    """From hidden states to (T, 3 n, d): queries, keys, and values filled up with zeros."""

    def __init__(self, attention: Attention, latent: Latent, parameters: Mapping[str, Tensor]) -> None:
        self._spec = latent
        self._head_dim = attention.head_dim
        self._rotary_dim = attention.head_dim - latent.plain_dim
        self._kv_down, self._kv_up = (
            Linear(weight_of(parameters, "kv_down")),
            ColumnParallelLinear(weight_of(parameters, "kv_up")),
        )
        self._kv_norm = NormWeights.of(latent.norm, "kv_norm", parameters)
        self._q_down: Linear | None = None
        if latent.query_rank is not None:
            self._q_down = Linear(weight_of(parameters, "q_down"))
            self._q_norm = NormWeights.of(latent.norm, "q_norm", parameters)
        self._q = ColumnParallelLinear(weight_of(parameters, "q"))
        self.num_heads = self._q.out_size // self._head_dim

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x if self._q_down is None else self._q_norm(self._q_down(x))
        queries = self._q(narrow).view(x.shape[0], self.num_heads, self._head_dim)
        plain, turned = torch.split(queries, [self._spec.plain_dim, self._rotary_dim], dim=-1)
        latent, shared = torch.split(self._kv_down(x), [self._spec.kv_rank, self._rotary_dim], dim=-1)
        both = self._kv_up(self._kv_norm(latent.contiguous()))
        both = both.view(x.shape[0], self.num_heads, self._spec.plain_dim + self._spec.value_dim)
        key, value = torch.split(both, [self._spec.plain_dim, self._spec.value_dim], dim=-1)
        shared = shared[:, None].expand(-1, self.num_heads, -1)
        queries, keys = torch.cat((turned, plain), dim=-1), torch.cat((shared, key), dim=-1)
        return torch.cat((queries, keys, F.pad(value, (0, self._head_dim - self._spec.value_dim))), dim=1)
