"""Column-, row- and vocabulary-parallel linears and embeddings: the places where a rank's part becomes the whole.

Legend: T tokens, H hidden size, V vocabulary, v / n / k a rank's block of an axis. A weight is (out, in), as stored.
A block may be empty (more ranks than heads): its product is zeros, and the sum is still right.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.parallel.quantized import Int8Weight, Weight, join_weights
from shardray.parallel.rows import best_column, best_columns, join_rows, pick_best, take_rows

_ONEDNN = "onednn"


class Linear:
    """``x @ weight.T + bias`` on one rank.

    CPU weights of one or two bytes are packed once, for our kernel or oneDNN's. On CUDA a few tokens go through our
    kernel. Packed weights that are there already (see ``kept.py``) come as tensors of the device "meta": a shape and no
    bytes.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        stored = weight.values if isinstance(weight, Int8Weight) else weight
        self.out_size = stored.shape[0]
        self.device = torch.device("cpu") if stored.is_meta else stored.device
        self._multiply = _prepare_int8(weight, bias) if isinstance(weight, Int8Weight) else _prepare(weight, bias)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(T, in) -> (T, out), in ``dtype`` or that of ``x``"""
        return self._multiply(x, dtype or x.dtype)


def _prepare(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, torch.dtype], Tensor]:
    """The fastest product there is for a weight; holds the weight as that product reads it, and nothing else of it."""
    if runs_triton(weight.device):
        return _with_narrow_kernel(weight, bias)
    layout = packed_layout("cpu" if weight.is_meta else weight.device.type, weight.dtype)
    if layout is None or weight.numel() == 0:
        return lambda x, dtype: F.linear(x, weight, bias).to(dtype)
    if layout != _ONEDNN:
        from shardray.parallel.kernels.linear import PackedLinear

        return PackedLinear(weight, bias, layout)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x, dtype: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "").to(dtype)


def _prepare_int8(weight: Int8Weight, bias: Tensor | None) -> Callable[[Tensor, torch.dtype], Tensor]:
    """On CPUs what is multiplied is rounded to 8 bits as well; elsewhere the weight is widened for it."""
    values, scales = weight
    if runs_triton(values.device) and values.numel() > 0:
        return _with_narrow_int8_kernel(weight, bias)
    layout = packed_layout("cpu" if values.is_meta else values.device.type, values.dtype)
    if layout is None or values.numel() == 0:
        return lambda x, dtype: _widened(x, weight, bias, dtype)
    from shardray.parallel.kernels.int8_linear import PackedInt8Linear

    return PackedInt8Linear(values, scales, bias, layout)


def _widened(x: Tensor, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    product = F.linear(x, weight.values.to(x.dtype)).float() * weight.scales.T
    return (product if bias is None else product + bias).to(dtype)


def _with_narrow_int8_kernel(weight: Int8Weight, bias: Tensor | None) -> Callable[[Tensor, torch.dtype], Tensor]:
    from shardray.parallel.kernels import triton_linear

    values, scales = (one.contiguous() for one in weight)

    def multiply(x: Tensor, dtype: torch.dtype) -> Tensor:
        is_narrow = x.dtype in triton_linear.DTYPES and 0 < x.shape[0] <= triton_linear.MAX_INT8_TOKENS
        if is_narrow and x.stride(-1) == 1:
            return triton_linear.multiply(x, values, bias, dtype, scales)
        return _widened(x, Int8Weight(values, scales), bias, dtype)

    return multiply


def _with_narrow_kernel(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, torch.dtype], Tensor]:
    from shardray.parallel.kernels import triton_linear

    is_covered = weight.dtype in triton_linear.DTYPES and weight.numel() > 0 and weight.is_contiguous()

    def multiply(x: Tensor, dtype: torch.dtype) -> Tensor:
        if is_covered and 0 < x.shape[0] <= triton_linear.MAX_TOKENS and x.stride(-1) == 1:
            return triton_linear.multiply(x, weight, bias, dtype)
        return F.linear(x, weight, bias).to(dtype)

    return multiply


def is_packed(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a Linear on this machine keeps its weight in a layout of its own, beside the one that it is given."""
    return packed_layout(device_type, dtype) is not None


def can_share(device_type: str, dtype: torch.dtype) -> bool:
    """Whether processes of this machine can hold weights together: on its CPUs, in memory that is ours."""
    return device_type == "cpu" and packed_layout(device_type, dtype) != _ONEDNN


def packed_layout(device_type: str, dtype: torch.dtype) -> str | None:
    """Which layout that is: a variant of our kernel, or oneDNN's, whose memory is its own affair."""
    if device_type != "cpu":
        return None
    if dtype == torch.int8:
        return _int8_variant()
    if dtype == torch.bfloat16 and (variant := _kernel_variant()) is not None:
        return variant
    return _ONEDNN if _can_prepack(dtype) else None


@functools.cache
def _kernel_variant() -> str | None:
    """Which of our kernels for bfloat16 is this processor's best choice, if any."""
    if importlib.util.find_spec("numba") is None:
        return None
    from shardray.parallel.kernels.linear import cpu_features, variant_for

    return variant_for(cpu_features())


@functools.cache
def _int8_variant() -> str | None:
    """Which of our kernels for weights of 8 bits is this processor's, if any."""
    if importlib.util.find_spec("numba") is None:
        return None
    from shardray.parallel.kernels.int8_linear import variant_for
    from shardray.parallel.kernels.linear import cpu_features

    return variant_for(cpu_features())


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
    def merged(cls, weights: Sequence[Weight], biases: Sequence[Tensor] | None) -> ColumnParallelLinear:
        return cls(join_weights(weights), None if biases is None else join_rows(biases))


class RowParallelLinear:
    """Each rank holds a block of input columns; the partial products are summed. Rank 0's has the bias in it."""

    def __init__(self, weight: Weight, bias: Tensor | None, comm: Comm) -> None:
        self._linear = Linear(weight, bias if comm.rank == 0 else None)
        self.device = self._linear.device
        self._comm = comm

    def __call__(self, x: Tensor) -> Tensor:
        """(T, k) -> (T, H)"""
        return self._comm.all_reduce(self._linear(x))


class VocabParallelEmbedding:
    """Each rank holds a block of rows; rows of other ranks come in through the sum (exact: one term is not zero)."""

    def __init__(self, weight: Tensor, first_row: int, comm: Comm) -> None:
        self._weight = weight
        self._first_row = first_row
        self._comm = comm

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(T,) int64 -> (T, H)"""
        if self._comm.size == 1:
            return take_rows(self._weight, token_ids)
        return self._comm.all_reduce(take_rows(self._weight, token_ids, self._first_row))


class VocabParallelHead:
    """Each rank makes the logits of its vocabulary rows, and they stay there until somebody needs them all."""

    def __init__(self, weight: Weight, bias: Tensor | None, widths: Sequence[int], comm: Comm) -> None:
        """``widths``: rows of every rank."""
        self._linear = Linear(weight, bias)
        self._widths = list(widths)
        self._comm = comm
        self._first_row = sum(widths[: comm.rank])
        self.device = self._linear.device

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, v) float32 of this rank's rows"""
        return self._linear(x, torch.float32)

    def gather(self, block: Tensor) -> Tensor | None:
        """(T, V) on rank 0 of the group, None elsewhere"""
        return self._comm.gather(block, self._widths)

    def best(self, block: Tensor) -> Tensor:
        """The token of the highest logit of each row, the first among equals, on every rank: (T,) int64"""
        if self._comm.size == 1:
            return best_column(block)
        return pick_best(self._comm.all_gather(best_columns(block, self._first_row)))
