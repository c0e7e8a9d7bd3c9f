"""Products of few tokens with a whole weight, on CUDA: as fast as the weight can be read.

A program makes a few outputs of all tokens. It streams its rows of the weight through shared memory, several blocks
ahead of the arithmetic, which the tensor cores do on a tile of 16 tokens: those that are not there are zeros, and cost
nothing that shows beside the reading. So one compiled kernel serves any number of tokens, the sum over K always goes in
the same order, and a token's result does not depend on who shares the batch.

Legend: T tokens, N outputs, K inputs.
"""

# mypy: ignore-errors
# (Triton's dialect: pointers and tiles)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardray.parallel.kernels.triton_launch import launch_options

MAX_TOKENS = 4  # above, cuBLAS; the tile itself has room for 16
MAX_INT8_TOKENS = 16  # of a weight of 8 bits, which cuBLAS reads only once it has been widened
DTYPES = (torch.bfloat16, torch.float16)
TILE_TOKENS = 16  # rows of a tensor core's smallest tile


@triton.jit(do_not_specialize=["num_tokens"])
def narrow_linear(
    x, weight, scales, bias, out, num_tokens, num_outputs, num_inputs, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out (T, N) = x (T, K) @ weight (N, K).T * scales (N,) + bias (N,); summed in float32, rounded once.

    A weight of 8 bits is widened in registers, exactly.
    """
    tokens, columns, places = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns += tl.program_id(0) * BLOCK_N
    is_token, is_column = tokens[:, None] < num_tokens, columns < num_outputs
    rows = weight + columns[None, :].to(tl.int64) * num_inputs
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        place = start + places
        there = place < num_inputs
        inputs = tl.load(x + tokens[:, None] * x_stride + place[None, :], is_token & there[None, :], 0.0)
        block = tl.load(rows + place[:, None], there[:, None] & is_column[None, :], 0.0)
        if HAS_SCALES:
            block = block.to(tl.float32).to(inputs.dtype)
        sums = tl.dot(inputs, block, sums)
    if HAS_SCALES:
        sums *= tl.load(scales + columns, is_column, 0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + columns, is_column, 0.0).to(tl.float32)[None, :]
    at = tokens[:, None] * num_outputs + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), is_token & is_column[None, :])


def blocks(num_outputs: int) -> tuple[int, int, int, int]:
    """Outputs and inputs of a block, warps, stages. A block of the weight is 8 or 16 KiB, all but one stage in flight.

    Narrow blocks where there are few outputs, so that all cores have some.
    """
    return (16, 256, 2, 5) if num_outputs <= 8192 else (32, 256, 4, 4)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """(T, K) -> (T, N) in ``dtype``; T is 1 to MAX_TOKENS, weights have two bytes; or up to MAX_INT8_TOKENS, and they
    are int8 with float32 ``scales`` (N, 1). Rows of ``x`` may have a stride."""
    num_tokens, (num_outputs, num_inputs) = x.shape[0], weight.shape
    block_n, block_k, num_warps, num_stages = blocks(num_outputs)
    out = torch.empty(num_tokens, num_outputs, dtype=dtype, device=x.device)
    narrow_linear[(triton.cdiv(num_outputs, block_n),)](
        x, weight, scales, bias, out, num_tokens, num_outputs, num_inputs, x.stride(0),
        BLOCK_T=TILE_TOKENS, BLOCK_N=block_n, BLOCK_K=block_k, HAS_SCALES=scales is not None, HAS_BIAS=bias is not None,
        **launch_options(num_warps, num_stages),
    )  # fmt: skip
    return out
