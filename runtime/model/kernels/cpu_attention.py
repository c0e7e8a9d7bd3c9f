"""Decode attention that reads the pages in place, on CPUs: one task per (row, KV head), softmax in float32.

A task reads each page of its KV head for up to four query heads at a time. What it computes depends on its row alone,
so a row's result is the same whoever shares the batch.

Legend: D decode rows, n / g query and KV heads, d head size, b tokens a page, W blocks in a row of the block table.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars, names bound when a kernel is compiled)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.jit import Element
from shardray.runtime.model.kernels import page_tiles
from shardray.runtime.model.kernels.page_tiles import MAX_HEADS, PageElement, make_accumulate_page, make_score_page


class Variant(NamedTuple):
    """Attention for pages of one dtype: what the names below stand for."""

    name: str
    pointer: object
    load: object
    store: object
    element_bytes: int
    score_page: object
    accumulate_page: object


def make_variant(element: Element, page_element: PageElement) -> Variant:
    return Variant(*element, page_element.num_bytes, make_score_page(page_element), make_accumulate_page(page_element))


_, pointer, load, store, element_bytes, score_page, accumulate_page = make_variant(jit.FLOAT32, page_tiles.FLOAT32)


@numba.njit(inline="always", fastmath=jit.MATH)
def _normalize(scores, bits, num_tokens):
    """The softmax of the first scores, in place"""
    highest = scores[0]
    for i in range(1, num_tokens):
        highest = max(highest, scores[i])
    for i in range(num_tokens):
        scores[i] -= highest
    jit.exp_in_place(scores, bits, num_tokens)
    total = np.float32(0.0)
    for i in range(num_tokens):
        total += scores[i]
    for i in range(num_tokens):
        scores[i] /= total


@numba.njit(inline="always")
def _pages(tables, first, block, num_pages, num_kv_heads, kv_head):
    """The tile of a block of the row, and that of the next one"""
    following = min(block + 1, num_pages - 1)
    page, next_page = np.int64(tables[first + block]), np.int64(tables[first + following])
    return page * num_kv_heads + kv_head, next_page * num_kv_heads + kv_head


def decode(args):
    """args: D, n, g, d, b, W, queries, row stride, keys, values, block tables, context lengths, groups, out, scale

    ``groups`` is (g + 1,) int64: query heads [groups[i], groups[i + 1]) read KV head i. ``scale`` is the address of a
    float32. Tensors are contiguous but for the rows of ``queries``; out is (D, n, d). b and d are multiples of 16.
    """
    a = numba.carray(args, (16,))
    num_rows, num_heads, num_kv_heads, head_dim = a[1], a[2], a[3], a[4]
    block_size, num_blocks, row_stride = a[5], a[6], a[8]
    queries, keys, values = pointer(a[7]), a[9], a[10]
    tables, context_lens, groups = jit.pointer_i32(a[11]), jit.pointer_i32(a[12]), jit.pointer_i64(a[13])
    out, scale = pointer(a[14]), jit.pointer_f32(a[15])[0]
    tile_bytes = block_size * head_dim * element_bytes
    query_words = np.empty(num_heads * head_dim, np.uint32)
    query = query_words.view(np.float32)
    sums = np.empty(num_heads * head_dim, np.float32)
    out_words = sums.view(np.uint32)
    query_at, sums_at = vector.address_of(query), vector.address_of(sums)
    while True:
        task = jit.take_task(args)
        if task >= num_rows * num_kv_heads:
            break
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        first_head, context_len = groups[kv_head], np.int64(context_lens[row])
        group = groups[kv_head + 1] - first_head
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
            page, following = _pages(tables, row * num_blocks, block, num_pages, num_kv_heads, kv_head)
            for h in range(0, group, MAX_HEADS):
                score_page(
                    min(MAX_HEADS, group - h), query_at + h * head_dim * 4, head_dim, keys + page * tile_bytes,
                    keys + following * tile_bytes, block_size, scores_at + (h * row_len + block * block_size) * 4,
                    row_len,
                )  # fmt: skip
        for h in range(group):
            _normalize(scores[h * row_len : (h + 1) * row_len], bits, context_len)
        for block in range(num_pages):
            page, following = _pages(tables, row * num_blocks, block, num_pages, num_kv_heads, kv_head)
            first = block * block_size
            for h in range(0, group, MAX_HEADS):
                accumulate_page(
                    min(MAX_HEADS, group - h), scores_at + (h * row_len + first) * 4, row_len,
                    values + page * tile_bytes, values + following * tile_bytes,
                    min(block_size, context_len - first), head_dim, sums_at + h * head_dim * 4,
                )  # fmt: skip
        scores[0] = np.float32(0.0)  # numba frees an array after its last mention; its address does not count as one
        store(out_words, group * head_dim, out, (row * num_heads + first_head) * head_dim)
