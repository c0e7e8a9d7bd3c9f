"""Column-, row- and vocabulary-parallel linears and embeddings: the places where a rank's part becomes the whole.

Legend: T tokens, H hidden size, V vocabulary, v / n / k a rank's block of an axis. A weight is (out, in), as stored.
A block may be empty (more ranks than heads): its product is zeros, and the sum is still right.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm


class Linear:
    """``x @ weight.T + bias`` on one rank. CPU weights of two bytes are repacked once for oneDNN's kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_size = weight.shape[0]
        self.num_bytes = weight.numel() * weight.element_size()
        self._bias = bias
        self._packed = weight.device.type == "cpu" and weight.numel() > 0 and _can_prepack(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)"""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


@functools.cache
def _can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for this two-byte type on this processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class ColumnParallelLinear(Linear):
    """Each rank holds a block of output rows; outputs stay split. Several projections of one input merge into one."""

    @classmethod
    def merged(cls, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> ColumnParallelLinear:
        return cls(torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))


class RowParallelLinear:
    """Each rank holds a block of input columns; the partial products are summed, then the bias is added once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, comm: Comm) -> None:
        self._linear = Linear(weight)
        self._bias = bias
        self._comm = comm
        self.num_bytes = self._linear.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """(T, k) -> (T, H)"""
        y = self._comm.all_reduce(self._linear(x))
        return y if self._bias is None else y.add_(self._bias)


class VocabParallelEmbedding:
    """Each rank holds a block of rows; rows of other ranks come in through the sum (exact: one term is not zero)."""

    def __init__(self, weight: Tensor, first_row: int, comm: Comm) -> None:
        self._weight = weight
        self._first_row = first_row
        self._comm = comm

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(T,) int64 -> (T, H)"""
        if self._comm.size == 1:
            return F.embedding(token_ids, self._weight)
        local = token_ids - self._first_row
        foreign = (local < 0) | (local >= self._weight.shape[0])
        if self._weight.shape[0] == 0:
            x = self._weight.new_zeros(token_ids.shape[0], self._weight.shape[1])
        else:
            x = F.embedding(local.masked_fill(foreign, 0), self._weight).masked_fill_(foreign[:, None], 0.0)
        return self._comm.all_reduce(x)


class VocabParallelHead:
    """Each rank makes the logits of its vocabulary rows; rank 0 gathers them."""

    def __init__(self, weight: Tensor, widths: Sequence[int], comm: Comm) -> None:
        self._linear = Linear(weight)
        self._widths = list(widths)
        self._comm = comm
        self.num_bytes = self._linear.num_bytes

    def __call__(self, x: Tensor) -> Tensor | None:
        """(T, H) -> (T, V) float32 on rank 0 of the group, None elsewhere"""
        logits = self._comm.gather(self._linear(x), self._widths)
        return None if logits is None else logits.float()
