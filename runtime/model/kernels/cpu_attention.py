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

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.jit import FLOAT32

_, pointer, load, store = FLOAT32  # replaced by those of the element a kernel is compiled for


@numba.njit(fastmath=jit.MATH)
def _scores(queries, first_query, keys, head_dim, block_size, scores, first_score):
    """scores = one query . each token of the (d, b) tile, for all places of the page, filled or not"""
    for i in range(0, block_size, vector.WIDTH):
        even, odd = vector.zeros(), vector.zeros()
        for j in range(0, head_dim, 2):
            even = vector.multiply_add(queries[first_query + j], vector.load_float32(keys, j * block_size + i), even)
            key = vector.load_float32(keys, (j + 1) * block_size + i)
            odd = vector.multiply_add(queries[first_query + j + 1], key, odd)
        vector.store(scores, first_score + i, vector.add(even, odd))


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


@numba.njit(fastmath=jit.MATH)
def _accumulate(weights, first_weight, values, num_tokens, head_dim, sums, first_sum):
    """sums += the first tokens of the (b, d) tile, weighted"""
    for j in range(0, head_dim, vector.WIDTH):
        total = vector.load_float32(sums, first_sum + j)
        for i in range(num_tokens):
            value = vector.load_float32(values, i * head_dim + j)
            total = vector.multiply_add(weights[first_weight + i], value, total)
        vector.store(sums, first_sum + j, total)


def decode(args):
    """args: D, n, g, d, b, W, queries, row stride, keys, values, block tables, context lengths, groups, out, scale

    ``groups`` is (g + 1,) int64: query heads [groups[i], groups[i + 1]) read KV head i. ``scale`` is the address of a
    float32. Tensors are contiguous but for the rows of ``queries``; out is (D, n, d). b and d are multiples of 16.
    """
    a = numba.carray(args, (16,))
    num_rows, num_heads, num_kv_heads, head_dim = a[1], a[2], a[3], a[4]
    block_size, num_blocks, row_stride = a[5], a[6], a[8]
    queries, keys, values = pointer(a[7]), pointer(a[9]), pointer(a[10])
    tables, context_lens, groups = jit.pointer_i32(a[11]), jit.pointer_i32(a[12]), jit.pointer_i64(a[13])
    out, scale = pointer(a[14]), jit.pointer_f32(a[15])[0]
    tile_size = block_size * head_dim
    tile_words = np.empty(tile_size, np.uint32)
    tile = tile_words.view(np.float32)
    tile_at = vector.address_of(tile)
    query_words = np.empty(num_heads * head_dim, np.uint32)
    query = query_words.view(np.float32)
    sums = np.empty(num_heads * head_dim, np.float32)
    out_words = sums.view(np.uint32)
    query_at, sums_at = vector.address_of(query), vector.address_of(sums)
    totals = np.empty(num_heads, np.float32)
    while True:
        task = jit.take_task(args)
        if task >= num_rows * num_kv_heads:
            break
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        first_head, last_head = groups[kv_head], groups[kv_head + 1]
        context_len = np.int64(context_lens[row])
        group = last_head - first_head
        num_pages = (context_len + block_size - 1) // block_size
        row_len = num_pages * block_size
        scores = np.empty(group * row_len, np.float32)
        scores_at = vector.address_of(scores)
        bits = np.empty(context_len, np.int32)
        load(queries, row * row_stride + first_head * head_dim, group * head_dim, query_words)
        for i in range(group * head_dim):
            query[i] *= scale
            sums[i] = np.float32(0.0)
        for block in range(num_pages):
            first = block * block_size
            page = np.int64(tables[row * num_blocks + block])
            load(keys, (page * num_kv_heads + kv_head) * tile_size, tile_size, tile_words)
            for h in range(group):
                _scores(query_at, h * head_dim, tile_at, head_dim, block_size, scores_at, h * row_len + first)
        for h in range(group):
            totals[h] = _normalize(scores[h * row_len : (h + 1) * row_len], bits, context_len)
        for block in range(num_pages):
            first = block * block_size
            num_tokens = min(block_size, context_len - first)
            page = np.int64(tables[row * num_blocks + block])
            load(values, (page * num_kv_heads + kv_head) * tile_size, num_tokens * head_dim, tile_words)
            for h in range(group):
                _accumulate(scores_at, h * row_len + first, tile_at, num_tokens, head_dim, sums_at, h * head_dim)
        for h in range(group):
            for j in range(head_dim):
                sums[h * head_dim + j] /= totals[h]
        store(out_words, group * head_dim, out, (row * num_heads + first_head) * head_dim)
