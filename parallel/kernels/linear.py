"""``x @ weight.T + bias`` for bfloat16 on CPUs, from weights that are packed once. Sums are float32 and in K's order.

Weights lie in blocks of 64 outputs, what is left in blocks of 16; a block holds, for each pair of inputs, that pair of
each of its outputs side by side:

    outputs  0..63    pairs 0..K/2 x [64 outputs x 2]     a load brings 16 pairs; they meet one pair of a row of x
             64..79   pairs 0..K/2 x [16 outputs x 2]     zeros pad outputs to 16 and K to 2

A result depends on its row of x and its row of weights alone, to the bit: not on T, on N or on the threads.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection

import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from shardray.parallel.kept import keep
from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import Kernel
from shardray.parallel.kernels.pairs_product import make_variant
from shardray.parallel.kernels.product import Variant, product
from shardray.parallel.kernels.vector import WIDTH
from shardray.parallel.workspace import empty

_PAIR_FEATURES = {"avx512f", "avx512bf16"}


@functools.cache
def cpu_features() -> frozenset[str]:
    """What kernels are compiled for: this processor, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say instead."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is not None or "NUMBA_CPU_NAME" in os.environ:
        return frozenset(feature[1:] for feature in (chosen or "").split(",") if feature.startswith("+"))
    return frozenset(name for name, there in get_host_cpu_features().items() if there)


def variant_for(features: Collection[str]) -> str | None:
    """The name of the fastest product of a processor; None where matrix units (AMX) make oneDNN's faster."""
    if "amx-bf16" in features:
        return None
    if "avx512f" not in features:
        return "narrow"
    return "pairs" if "avx512bf16" in features else "halves"


def runs_here(variant_name: str) -> bool:
    return variant_name != "pairs" or cpu_features() >= _PAIR_FEATURES


@functools.cache
def _compiled(variant: Variant) -> Kernel:
    return jit.compile_kernel(product, variant)


class PackedLinear:
    """One weight, packed. Computes on as many threads as torch would where it is called."""

    def __init__(self, weight: Tensor, bias: Tensor | None, variant_name: str) -> None:
        """``weight`` (N, K) bfloat16, not empty, and ``bias`` (N,); neither is kept.

        What is in a shared segment already is not read: ``weight`` may then be on the device "meta".
        """
        variant = make_variant(variant_name)
        self._kernel = _compiled(variant)
        self._out_size, self._in_size = weight.shape
        packed_shape = round_up(self._out_size, WIDTH), round_up(self._in_size, 2)
        self._weights = keep(packed_shape, weight.dtype, lambda packed: _pack(weight, packed, variant.block_vectors))
        self._bias = torch.zeros(packed_shape[0])
        if bias is not None:
            self._bias[: self._out_size] = bias
        num_pairs = (self._in_size + 1) // 2
        self._fixed = self._out_size, num_pairs, self._weights.data_ptr(), self._bias.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """(T, K) bfloat16 -> (T, N) in ``dtype``: bfloat16 or float32"""
        num_tokens = x.shape[0]
        out = empty((num_tokens, self._out_size), dtype)
        if num_tokens > 0:
            x = F.pad(x, (0, 1)) if self._in_size % 2 else x.contiguous()
            threads = torch.get_num_threads()
            wide = dtype == torch.float32
            self._kernel(threads, num_tokens, x.data_ptr(), out.data_ptr(), threads, *self._fixed, wide, 0, 0, 0)
        return out


def _pack(weight: Tensor, packed: Tensor, block_vectors: int) -> None:
    """(N, K) -> as drawn above, in the memory of ``packed``: (N, K) rounded up to what is drawn"""
    if weight.shape != packed.shape:
        weight = F.pad(weight, (0, packed.shape[1] - weight.shape[1], 0, packed.shape[0] - weight.shape[0]))
    pack_words(weight.view(torch.int32), packed.view(torch.int32), block_vectors)


def pack_words(weight: Tensor, packed: Tensor, block_vectors: int) -> None:
    """(N, words of K) int32 -> blocks, of which each holds word for word of K that of each of its outputs."""
    block, num_words = block_vectors * WIDTH, weight.shape[1]
    num_blocks = weight.shape[0] // block
    for part, size in ((slice(num_blocks * block), block), (slice(num_blocks * block, None), WIDTH)):
        packed[part].view(-1, num_words, size).copy_(weight[part].view(-1, size, num_words).transpose(1, 2))


def round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
