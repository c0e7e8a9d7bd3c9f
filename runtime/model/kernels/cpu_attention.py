"""Decode attention that reads the pages in place, on CPUs: one task per (row, KV head), softmax in float32.

A task reads each page of its KV head for up to four query heads at a time. What it computes depends on its row alone,
so a row's result is the same whoever shares the batch. Weights of the softmax are of the pages' dtype.

Pages lie anywhere, so the processor cannot guess what is read next. A list of tiles says it: those of the keys, those
of the values, then the first keys of the task that this thread likely takes next. ``_AHEAD`` of them are on their way.

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

_AHEAD = 4  # tiles: far enough to hide memory, too few to push one another out of the cache


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
    page_kernels = make_score_page(page_element), make_accumulate_page(page_element)
    return Variant(page_element.name, *element[1:], page_element.num_bytes, *page_kernels)


_, pointer, load, store, element_bytes, score_page, accumulate_page = make_variant(jit.FLOAT32, page_tiles.FLOAT32)


@numba.njit(inline="always", fastmath=jit.MATH)
def _soften(scores, bits, num_tokens, scale):
    """The softmax of ``scale`` times the first scores, in place; 0 behind them, if there is room"""
    highest = scores[0] * scale
    for i in range(num_tokens):
        scores[i] *= scale
        highest = max(highest, scores[i])
    for i in range(num_tokens):
        scores[i] -= highest
    jit.exp_in_place(scores, bits, num_tokens)
    total = np.float32(0.0)
    for i in range(num_tokens):
        total += scores[i]
    for i in range(num_tokens):
        scores[i] /= total
    if num_tokens < len(scores):
        scores[num_tokens] = np.float32(0.0)


@numba.njit(inline="always")
def _list_tiles(tiles, tables, first, num_pages, num_kv_heads, kv_head, pages, tile_bytes):
    """The tiles of one KV head on the pages from place ``first`` of the tables on; as often as needed the last one"""
    for i in range(len(tiles)):
        page = np.int64(tables[first + min(i, num_pages - 1)])
        tiles[i] = pages + (page * num_kv_heads + kv_head) * tile_bytes


def decode(args):
    """args: row list, threads, n, g, d, b, W, queries, row stride, keys, values, block tables, context lengths,
    groups, out, scale

    The row list begins with D, int64. ``groups`` is (g + 1,) int64: query heads [groups[i], groups[i + 1]) read KV
    head i. ``scale`` is the address of a float32. Tensors are contiguous but for the rows of ``queries``; out is
    (D, n, d). b and d are multiples of 16.
    """
    a = numba.carray(args, (17,))
    num_tasks, num_threads, num_heads, num_kv_heads, head_dim = jit.pointer_i64(a[1])[0] * a[4], a[2], a[3], a[4], a[5]
    block_size, num_blocks, queries, row_stride, keys, values = a[6], a[7], a[8], a[9], a[10], a[11]
    tables, context_lens, groups = jit.pointer_i32(a[12]), jit.pointer_i32(a[13]), jit.pointer_i64(a[14])
    out, scale = pointer(a[15]), jit.pointer_f32(a[16])[0]
    tile_bytes = block_size * head_dim * element_bytes
    tiles = np.empty(2 * num_blocks + _AHEAD, np.int64)
    sums = np.empty(num_heads * head_dim, np.float32)
    out_words, sums_at = sums.view(np.uint32), vector.address_of(sums)
    while True:
        task = jit.take_task(args)
        if task >= num_tasks:
            break
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        first_head, context_len = groups[kv_head], np.int64(context_lens[row])
        group = groups[kv_head + 1] - first_head
        num_pages = (context_len + block_size - 1) // block_size
        following = min(task + num_threads, num_tasks - 1)
        then, then_head = following // num_kv_heads, following % num_kv_heads
        then_pages = (np.int64(context_lens[then]) + block_size - 1) // block_size
        here, there = tiles[:num_pages], tiles[num_pages : 2 * num_pages]
        _list_tiles(here, tables, row * num_blocks, num_pages, num_kv_heads, kv_head, keys, tile_bytes)
        _list_tiles(there, tables, row * num_blocks, num_pages, num_kv_heads, kv_head, values, tile_bytes)
        later = tiles[2 * num_pages : 2 * num_pages + _AHEAD]
        _list_tiles(later, tables, then * num_blocks, then_pages, num_kv_heads, then_head, keys, tile_bytes)
        row_len = num_pages * block_size
        score_words, weights = np.empty(group * row_len, np.uint32), np.empty(group * row_len * element_bytes, np.uint8)
        scores, bits = score_words.view(np.float32), np.empty(context_len, np.int32)
        scores_at, weights_at = vector.address_of(scores), vector.address_of(weights)
        query_at = queries + (row * row_stride + first_head * head_dim) * element_bytes
        for block in range(num_pages):
            for h in range(0, group, MAX_HEADS):
                score_page(
                    min(MAX_HEADS, group - h), query_at + h * head_dim * element_bytes, head_dim, tiles[block],
                    tiles[block + _AHEAD], block_size, scores_at + (h * row_len + block * block_size) * 4, row_len,
                )  # fmt: skip
        for h in range(group):
            _soften(scores[h * row_len : (h + 1) * row_len], bits, context_len, scale)
            store(score_words[h * row_len :], min(context_len + 1, row_len), pointer(weights_at), h * row_len)
        sums[: group * head_dim] = np.float32(0.0)
        for block in range(num_pages):
            first, place = block * block_size, num_pages + block
            for h in range(0, group, MAX_HEADS):
                accumulate_page(
                    min(MAX_HEADS, group - h), weights_at + (h * row_len + first) * element_bytes, row_len,
                    tiles[place], tiles[place + _AHEAD], min(block_size, context_len - first), head_dim,
                    sums_at + h * head_dim * 4,
                )  # fmt: skip
        weights[0] = 0  # numba frees an array after its last mention; its address does not count as one
        store(out_words, group * head_dim, out, (row * num_heads + first_head) * head_dim)
