"""Decode attention that reads the pages in place, on CPUs: one task per (row, KV head), softmax in float32.

A task widens each page of its KV head once and uses it for all query heads of the group. What it computes depends on
its row alone, so a row's result is the same whoever shares the batch.

Legend: D decode rows, n / g query and KV heads, d head size, b tokens a page, W blocks in a row of the block table.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars, names bound when a kernel is compiled)

from __future__ import annotations

import numba
import numpy as np

from shardray.runtime.model.kernels import jit
from shardray.runtime.model.kernels.jit import FLOAT32

_, pointer, load, store = FLOAT32  # replaced by those of the element a kernel is compiled for


@numba.njit(inline="always", fastmath=jit.MATH)
def _scores(query, keys, num_tokens, head_dim, scores, first):
    """scores[first + i] = query . keys[i]"""
    for i in range(num_tokens):
        total = np.float32(0.0)
        for j in range(head_dim):
            total += query[j] * keys[i * head_dim + j]
        scores[first + i] = total


@numba.njit(inline="always", fastmath=jit.MATH)
def _normalize(scores, bits, num_tokens):
    """e ** (score - highest) in place; returns their sum."""
    highest = scores[0]
    for i in range(1, num_tokens):
        highest = max(highest, scores[i])
    for i in range(num_tokens):
        scores[i] -= highest
    jit.exp_in_place(scores, bits, num_tokens)
    total = np.float32(0.0)
    for i in range(num_tokens):
        total += scores[i]
    return total


@numba.njit(inline="always", fastmath=jit.MATH)
def _accumulate(weights, first, values, num_tokens, head_dim, out):
    """out += sum of weights[first + i] * values[i]"""
    for i in range(num_tokens):
        weight = weights[first + i]
        for j in range(head_dim):
            out[j] += weight * values[i * head_dim + j]


def decode(args):
    """args: D, n, g, d, b, W, queries, row stride, keys, values, block tables, context lengths, groups, out, scale

    ``groups`` is (g + 1,) int64: query heads [groups[i], groups[i + 1]) read KV head i. ``scale`` is the address of a
    float32. Tensors are contiguous but for the rows of ``queries``; out is (D, n, d).
    """
    a = numba.carray(args, (16,))
    num_rows, num_heads, num_kv_heads, head_dim = a[1], a[2], a[3], a[4]
    block_size, num_blocks, row_stride = a[5], a[6], a[8]
    queries, keys, values = pointer(a[7]), pointer(a[9]), pointer(a[10])
    tables, context_lens, groups = jit.pointer_i32(a[11]), jit.pointer_i32(a[12]), jit.pointer_i64(a[13])
    out, scale = pointer(a[14]), jit.pointer_f32(a[15])[0]
    tile_words = np.empty(block_size * head_dim, np.uint32)
    tile = tile_words.view(np.float32)
    query_words = np.empty(num_heads * head_dim, np.uint32)
    query = query_words.view(np.float32)
    sums = np.empty(num_heads * head_dim, np.float32)
    out_words = sums.view(np.uint32)
    totals = np.empty(num_heads, np.float32)
    while True:
        task = jit.take_task(args)
        if task >= num_rows * num_kv_heads:
            break
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        first_head, last_head = groups[kv_head], groups[kv_head + 1]
        context_len = np.int64(context_lens[row])
        group = last_head - first_head
        scores = np.empty((group, context_len), np.float32)
        bits = np.empty(context_len, np.int32)
        load(queries, row * row_stride + first_head * head_dim, group * head_dim, query_words)
        for i in range(group * head_dim):
            query[i] *= scale
            sums[i] = np.float32(0.0)
        for block in range((context_len + block_size - 1) // block_size):
            first = block * block_size
            num_tokens = min(block_size, context_len - first)
            page = np.int64(tables[row * num_blocks + block]) * block_size
            for i in range(num_tokens):
                start = ((page + i) * num_kv_heads + kv_head) * head_dim
                load(keys, start, head_dim, tile_words[i * head_dim : (i + 1) * head_dim])
            for h in range(group):
                _scores(query[h * head_dim : (h + 1) * head_dim], tile, num_tokens, head_dim, scores[h], first)
        for h in range(group):
            totals[h] = _normalize(scores[h], bits, context_len)
        for block in range((context_len + block_size - 1) // block_size):
            first = block * block_size
            num_tokens = min(block_size, context_len - first)
            page = np.int64(tables[row * num_blocks + block]) * block_size
            for i in range(num_tokens):
                start = ((page + i) * num_kv_heads + kv_head) * head_dim
                load(values, start, head_dim, tile_words[i * head_dim : (i + 1) * head_dim])
            for h in range(group):
                _accumulate(scores[h], first, tile, num_tokens, head_dim, sums[h * head_dim : (h + 1) * head_dim])
        for h in range(group):
            for j in range(head_dim):
                sums[h * head_dim + j] /= totals[h]
        store(out_words, group * head_dim, out, (row * num_heads + first_head) * head_dim)
