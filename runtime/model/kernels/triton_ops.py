"""The operations of a layer on CUDA, as kernels in Triton. What is not covered runs as torch calls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardray.parallel.kernels.triton_launch import launch_options, num_programs
from shardray.runtime.model.attention import AttentionTasks, KVPages, PagedAttention, StepView
from shardray.runtime.model.kernels import triton_attention, triton_elementwise
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.kernels.splits import SPLIT, TILE
from shardray.runtime.model.spec import Activation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
HEADS_A_PROGRAM = 8  # of rotate_and_store
COLUMNS_A_PROGRAM = 1024  # of activate
PROGRAMS_A_CORE = 2  # of decode; two fit unless a KV head has more than 32 query heads, and then take turns
SPLITS_AT_ONCE = 32  # of combine


def supports(dtype: torch.dtype) -> bool:
    return dtype in _DTYPES


class Blocks(NamedTuple):
    """How a kernel cuts its work: rows and columns of scores, warps, stages of its pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def norm_warps(size: int) -> int:
    return 4 if size <= 2048 else 8 if size <= 8192 else 16


def decode_blocks(dtype: torch.dtype, head_dim: int, largest_group: int) -> Blocks:
    """A block of keys is 16 KiB at most, and so is one of values.

    Two of each are on their way or in use: of the five stages of the pipeline the first two look up pages.
    """
    row_bytes = power_of_two(head_dim) * dtype.itemsize
    rows = max(16, power_of_two(largest_group))
    columns = max(16, min(128 // dtype.itemsize, (16 << 10) // row_bytes))
    return Blocks(rows, columns, 4 if rows < 64 and row_bytes <= 512 else 8, 5)


def prefill_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """As large as the registers hold; ``rows`` divides TILE."""
    wide = head_dim > 128
    if dtype == torch.float32:
        return Blocks(32 if wide else 64, 16 if head_dim > 64 else 32, 8, 2)
    return Blocks(64, 32, 8, 2) if wide else Blocks(128, 64, 8, 3)


def power_of_two(number: int) -> int:
    """The lowest one that is not lower."""
    return 1 << max(0, number - 1).bit_length()


class TritonOps(Ops):
    """Kernels for tensors on CUDA, or on a CPU while Triton interprets them."""

    def add_norm(self, norm: NormWeights, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        if not (x.is_contiguous() and (delta is None or delta.is_contiguous())):
            return super().add_norm(norm, x, delta)
        num_tokens, size = x.shape
        out = torch.empty_like(x)
        triton_elementwise.add_norm[(num_tokens,)](
            x, delta, norm.weight, norm.bias, out, size, norm.norm.eps, BLOCK=power_of_two(size),
            HAS_DELTA=delta is not None, HAS_WEIGHT=norm.weight is not None, HAS_BIAS=norm.bias is not None,
            IS_RMS=norm.norm.kind == "rms", **launch_options(norm_warps(size)),
        )  # fmt: skip
        return x, out

    def rotate_and_store(
        self, qkv: Tensor, num_heads: int, angles: Angles | None, pages: KVPages, layer: int, view: StepView
    ) -> Tensor:
        if not (qkv.is_contiguous() and pages.keys_by_token):
            return super().rotate_and_store(qkv, num_heads, angles, pages, layer, view)
        num_tokens, total_heads, head_dim = qkv.shape
        half = 0 if angles is None else angles.cos.shape[1]
        first_head = num_heads if angles is None else 0  # queries stay as they are
        grid = (num_tokens, -(-(total_heads - first_head) // HEADS_A_PROGRAM))
        triton_elementwise.rotate_and_store[grid](
            qkv, None if angles is None else angles.cos, None if angles is None else angles.sin, view.cache_index,
            pages.keys[layer], pages.values[layer], num_heads, (total_heads - num_heads) // 2, first_head,
            D=head_dim, BLOCK_D=power_of_two(head_dim), HALF=half, BLOCK_HALF=power_of_two(half),
            INTERLEAVED=angles is not None and angles.interleaved, PAGE=pages.block_size, HEADS=HEADS_A_PROGRAM,
            **launch_options(2),
        )  # fmt: skip
        return qkv[:, :num_heads]

    def activate(self, inner: Tensor, activation: Activation, gated: bool) -> Tensor:
        if not inner.is_contiguous():
            return super().activate(inner, activation, gated)
        num_tokens, size = inner.shape[0], inner.shape[1] // (2 if gated else 1)
        out = inner.new_empty(num_tokens, size)
        triton_elementwise.activate[(num_tokens, -(-size // COLUMNS_A_PROGRAM))](
            inner, out, size, KIND=activation, GATED=gated, BLOCK=COLUMNS_A_PROGRAM, **launch_options(4)
        )
        return out

    def attend(self, attention: PagedAttention, queries: Tensor, pages: KVPages, layer: int, view: StepView) -> Tensor:
        head_dim = queries.shape[-1]
        in_rows = queries.stride()[1:] == (head_dim, 1)
        if attention.num_heads == 0 or head_dim > _MAX_HEAD_DIM or not in_rows:
            return super().attend(attention, queries, pages, layer, view)
        assert view.tasks is not None, "a step for CUDA comes with its lists of tasks"
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if view.num_decodes:
            self._decode(attention, queries, out, pages, layer, view, view.tasks)
        if view.prefills:
            self._prefill(attention, queries, out, pages, layer, view, view.tasks)
        return out

    def _decode(
        self, attention: PagedAttention, queries: Tensor, out: Tensor, pages: KVPages, layer: int, view: StepView,
        tasks: AttentionTasks,
    ) -> None:  # fmt: skip
        head_dim, num_heads = queries.shape[-1], attention.num_heads
        blocks = decode_blocks(queries.dtype, head_dim, attention.largest_group)
        shape = (tasks.splits.shape[0], num_heads)
        partial_sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=queries.device)  # (W, n, d)
        partial_stats = torch.empty(*shape, 2, dtype=torch.float32, device=queries.device)
        triton_attention.decode[(num_programs(queries.device, PROGRAMS_A_CORE),)](
            queries, pages.keys[layer], pages.values[layer], view.block_tables, view.context_lens, tasks.splits,
            tasks.split_starts, attention.groups, _bias(attention), partial_sums, partial_stats, view.num_decodes,
            num_heads, len(attention.groups) - 1, pages.keys.shape[2], queries.stride(0), view.block_tables.stride(0),
            attention.scale * math.log2(math.e), BLOCK_H=blocks.rows, BLOCK_N=blocks.columns, SPLIT=SPLIT,
            **_variant(attention, pages), **launch_options(blocks.num_warps, blocks.num_stages),
        )  # fmt: skip
        triton_attention.combine[(view.num_decodes, num_heads)](
            partial_sums, partial_stats, tasks.split_starts, view.context_lens, attention.sinks, out, num_heads,
            D=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_S=SPLITS_AT_ONCE, BLOCK_N=blocks.columns, SPLIT=SPLIT,
            WINDOW=attention.window or 0, HAS_SINKS=attention.sinks is not None, **launch_options(4),
        )  # fmt: skip

    def _prefill(
        self, attention: PagedAttention, queries: Tensor, out: Tensor, pages: KVPages, layer: int, view: StepView,
        tasks: AttentionTasks,
    ) -> None:  # fmt: skip
        blocks = prefill_blocks(queries.dtype, queries.shape[-1])
        grid = (attention.num_heads, tasks.tiles.shape[0] * (TILE // blocks.rows))
        triton_attention.prefill[grid](
            queries, pages.keys[layer], pages.values[layer], view.block_tables, view.context_lens, tasks.query_starts,
            tasks.tiles, attention.kv_of_head, _bias(attention), attention.sinks, out, attention.num_heads,
            pages.keys.shape[2], queries.stride(0), view.block_tables.stride(0), attention.scale * math.log2(math.e),
            BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, TILE=TILE, CAUSAL=attention.causal,
            HAS_SINKS=attention.sinks is not None, **_variant(attention, pages),
            **launch_options(blocks.num_warps, blocks.num_stages),
        )  # fmt: skip


def _bias(attention: PagedAttention) -> Tensor | None:
    return attention.slopes if attention.slopes is not None else attention.biases


def _variant(attention: PagedAttention, pages: KVPages) -> dict[str, Any]:
    """What both attention kernels are compiled for."""
    bias = "slopes" if attention.slopes is not None else "none" if attention.biases is None else "table"
    head_dim = pages.keys.shape[-1]
    return {
        "D": head_dim,
        "BLOCK_D": max(16, power_of_two(head_dim)),
        "PAGE": pages.block_size,
        "WINDOW": attention.window or 0,
        "SOFTCAP": (attention.softcap or 0.0) * math.log2(math.e),
        "BIAS": bias,
        "FURTHEST": 0 if attention.biases is None else attention.biases.shape[1] // 2,
        "PRECISION": "ieee",  # of float32; tf32 would round to 10 bits
    }
