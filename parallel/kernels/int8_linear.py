"""``x @ weight.T + bias`` on CPUs with weights of 8 bits, of which x is rounded to 8 bits as well, 64 inputs at a time.

    weight[n, k] = scales[n] * values[n, k]         x[t, k] is about x_scales[t, k / 64] * rounded[t, k]

    out[t, n] = scales[n] * (sum over groups of x_scales[t, group] * (sum of rounded[t, k] * values[n, k])) + bias[n]

The inner sums are whole numbers, and exact; the outer one is float32, in K's order. So a result depends on its row of x
and its row of weights alone, to the bit, on any processor.

Weights lie in blocks of outputs as in linear.py, with four uint8 in place of two bfloat16.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor

from shardray.parallel.kept import keep
from shardray.parallel.kernels import jit
from shardray.parallel.kernels.int8_product import make_variant
from shardray.parallel.kernels.int8_tile import GROUP
from shardray.parallel.kernels.jit import Kernel
from shardray.parallel.kernels.linear import pack_words, round_up
from shardray.parallel.kernels.product import Variant, product
from shardray.parallel.kernels.vector import WIDTH
from shardray.parallel.workspace import empty

_ZERO = 128  # of uint8, which multiply faster


@functools.cache
def _compiled(variant: Variant) -> Kernel:
    return jit.compile_kernel(product, variant)


def variant_for(features: Collection[str]) -> str:
    """The name of the fastest product of a processor."""
    if "avx512f" not in features:
        return "narrow"
    return "quads" if "avx512vnni" in features else "shorts"


class PackedInt8Linear:
    """One weight, packed. Computes on as many threads as torch would where it is called."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None, variant_name: str) -> None:
        """``values`` (N, K) int8, not empty, ``scales`` (N, 1) and ``bias`` (N,); none is kept.

        What is in a shared segment already is not read: ``values`` may then be on the device "meta".
        """
        variant = make_variant(variant_name)
        self._kernel = _compiled(variant)
        self._out_size, in_size = values.shape
        packed_shape = round_up(self._out_size, WIDTH), round_up(in_size, GROUP)
        self._weights = keep(packed_shape, torch.uint8, lambda packed: _pack(values, packed, variant.block_vectors))
        self._scales, self._bias = torch.zeros(packed_shape[0]), torch.zeros(packed_shape[0])
        self._scales[: self._out_size] = scales[:, 0]
        if bias is not None:
            self._bias[: self._out_size] = bias
        self._fixed = self._out_size, packed_shape[1] // 4, self._weights.data_ptr(), self._bias.data_ptr()
        self._others = in_size, self._scales.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, K) floats -> (T, N) in ``dtype``"""
        out = empty((x.shape[0], self._out_size), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        if x.shape[0] > 0:
            x = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
            threads, (in_size, scales) = torch.get_num_threads(), self._others
            are_wide = out.dtype == torch.float32, in_size, x.dtype == torch.float32
            self._kernel(threads, x.shape[0], x.data_ptr(), out.data_ptr(), threads, *self._fixed, *are_wide, scales)
        return out if out.dtype == dtype else out.to(dtype)


def _pack(values: Tensor, packed: Tensor, block_vectors: int) -> None:
    """(N, K) int8 -> blocks of uint8 in the memory of ``packed``: (N, K) rounded up"""
    shifted = torch.full(packed.shape, _ZERO, dtype=torch.uint8)
    shifted[: values.shape[0], : values.shape[1]] = values.view(torch.uint8) ^ _ZERO
    pack_words(shifted.view(torch.int32), packed.view(torch.int32), block_vectors)
