"""Decode attention that reads the pages in place, on CPUs: one task per (row, KV head), softmax in float32.

A task reads each key and value of its KV head for up to four query heads at a time. It goes over the context in blocks,
as a flash attention does (flash_tiles.py), in bfloat16 in the same blocks and order as prefill (cpu_prefill.py): so a
token gets the same bits whether it was sampled or is read again as part of a prompt, and whoever shares the batch.
Weights of the softmax are of the pages' dtype.

Pages lie anywhere, so the processor cannot guess what is read next. A list says it, 16 tokens at a time: the keys and
the values of each block, then the first keys of the task that this thread likely takes next. ``_AHEAD`` of them are on
their way.

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
from shardray.parallel.kernels.vector import VECTOR_BYTES, WIDTH
from shardray.runtime.model.kernels import page_tiles
from shardray.runtime.model.kernels.flash_tiles import TILES, make_soften, make_top, shrink
from shardray.runtime.model.kernels.page_tiles import MAX_HEADS, PageElement, make_accumulate, make_score

_AHEAD = 4  # times 16 tokens: far enough to hide memory, too few to push one another out of the cache


class Variant(NamedTuple):
    """Attention for pages of one dtype: what the names below stand for."""

    name: str
    store: object
    pointer: object
    element_bytes: int
    tile_vectors: int  # of 16 tokens, as in prefill
    score: object
    accumulate: object
    top: object
    top_all: object
    soften: object
    soften_all: object


def make_variant(element: Element, page_element: PageElement, tile_vectors: int = 4) -> Variant:
    """``tile_vectors``: of the variant of prefill that goes with it."""
    num_bytes, in_bfloat16 = page_element.num_bytes, page_element.num_bytes == 2
    tops = (make_top(tile_vectors, TILES, all_visible) for all_visible in (False, True))
    softens = (make_soften(tile_vectors, TILES, all_visible, in_bfloat16) for all_visible in (False, True))
    page_kernels = make_score(page_element), make_accumulate(page_element)
    name = f"{page_element.name}_{tile_vectors}"
    return Variant(name, element.store, element.pointer, num_bytes, tile_vectors, *page_kernels, *tops, *softens)


_, store, pointer, element_bytes, tile_vectors, score, accumulate, top, top_all, soften, soften_all = make_variant(
    jit.FLOAT32, page_tiles.FLOAT32
)


@numba.njit(inline="always")
def _list(tiles, tables, first, begin, end, block_size, num_kv_heads, kv_head, pages, unit_bytes):
    """Where 16 tokens of one KV head lie, for the tokens from ``begin`` to ``end`` of the tables' row at ``first``.

    As often as needed the last ones. 16 tokens of keys lie in columns of a page's tile; what is listed is their share
    of it, in which values do lie.
    """
    for i in range(len(tiles)):
        token = min(begin + i * WIDTH, (end - 1) // WIDTH * WIDTH)
        page = np.int64(tables[first + token // block_size]) * num_kv_heads + kv_head
        tiles[i] = pages + (page * block_size + token % block_size) // WIDTH * unit_bytes


def decode(args):
    """args: row list, threads, n, g, d, b, W, queries, row stride, keys, values, block tables, context lengths,
    groups, out, scale

    The row list begins with D, int64. ``groups`` is (g + 1,) int64: query heads [groups[i], groups[i + 1]) read KV
    head i. ``scale``, the address of a float32, makes exponents of two of scores. Tensors are contiguous but for the
    rows of ``queries``; out is (D, n, d). b and d are multiples of 16.
    """
    a = numba.carray(args, (17,))
    num_tasks, num_threads, num_heads, num_kv_heads, head_dim = jit.pointer_i64(a[1])[0] * a[4], a[2], a[3], a[4], a[5]
    block_size, num_blocks, queries, row_stride, keys, values = a[6], a[7], a[8], a[9], a[10], a[11]
    tables, context_lens, groups = jit.pointer_i32(a[12]), jit.pointer_i32(a[13]), jit.pointer_i64(a[14])
    out, scale = pointer(a[15]), jit.pointer_f32(a[16])[0]
    unit_bytes, head_bytes = WIDTH * head_dim * element_bytes, head_dim * element_bytes
    tile_width, block_width = tile_vectors * WIDTH, TILES * tile_vectors * WIDTH
    units = np.empty(2 * (num_blocks * block_size // WIDTH) + _AHEAD, np.int64)
    sums, kept = np.empty(num_heads * head_dim, np.float32), np.empty(2 * num_heads, np.float32)
    scores, tops = np.empty(num_heads * block_width, np.float32), np.empty(num_heads, np.float32)
    weights = np.empty(num_heads * block_width * element_bytes, np.uint8)
    out_words, sums_at, kept_at = sums.view(np.uint32), vector.address_of(sums), vector.address_of(kept)
    scores_at, weights_at = vector.address_of(scores), vector.address_of(weights)
    while True:
        task = jit.take_task(args)
        if task >= num_tasks:
            break
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        first_head, context_len = groups[kv_head], np.int64(context_lens[row])
        group = groups[kv_head + 1] - first_head
        following = min(task + num_threads, num_tasks - 1)
        then, then_head = following // num_kv_heads, following % num_kv_heads
        then_len = np.int64(context_lens[then])
        place = 0
        for start in range(0, context_len, block_width):
            end = min(start + block_width, context_len)
            count = (end - start - 1) // WIDTH + 1
            for pages in (keys, values):
                part = units[place : place + count]
                _list(part, tables, row * num_blocks, start, end, block_size, num_kv_heads, kv_head, pages, unit_bytes)
                place += count
        part = units[place : place + _AHEAD]
        _list(part, tables, then * num_blocks, 0, then_len, block_size, num_kv_heads, then_head, keys, unit_bytes)
        query_at = queries + (row * row_stride + first_head * head_dim) * element_bytes
        tile_bytes = group * tile_width * 4  # of scores
        sums[: group * head_dim] = np.float32(0.0)
        for h in range(group):
            kept[2 * h], kept[2 * h + 1] = np.float32(-np.inf), np.float32(0.0)
        place = 0
        for start in range(0, context_len, block_width):
            visible = min(block_width, context_len - start)
            count = (visible - 1) // WIDTH + 1
            for unit in range(0, count, 2):
                other = min(unit + 1, count - 1)  # of an odd number the last one twice, where nobody looks
                column = (start + unit * WIDTH) % block_size
                first = units[place + unit] - column * head_bytes + column * element_bytes
                column = (start + other * WIDTH) % block_size
                second = units[place + other] - column * head_bytes + column * element_bytes
                score_at = scores_at + unit // tile_vectors * tile_bytes + unit % tile_vectors * VECTOR_BYTES
                for h in range(0, group, MAX_HEADS):
                    score(
                        min(MAX_HEADS, group - h), query_at + h * head_bytes, head_dim, block_size, first, second,
                        units[place + unit + _AHEAD], units[place + other + _AHEAD],
                        score_at + h * tile_width * 4, score_at + h * tile_width * 4 + VECTOR_BYTES, tile_width,
                    )  # fmt: skip
            place += count
            for h in range(group):
                row_at = scores_at + h * tile_width * 4
                if visible < block_width:
                    tops[h] = top(row_at, tile_bytes, visible)
                else:
                    tops[h] = top_all(row_at, tile_bytes, visible)
            for h in range(group):
                row_at, weight_at = scores_at + h * tile_width * 4, weights_at + h * block_width * element_bytes
                if visible < block_width:
                    factor = soften(row_at, tile_bytes, visible, scale, tops[h], kept_at + h * 8, weight_at)
                else:
                    factor = soften_all(row_at, tile_bytes, visible, scale, tops[h], kept_at + h * 8, weight_at)
                if factor != np.float32(1.0):
                    shrink(sums_at + h * head_dim * 4, head_dim // WIDTH, factor)
            for unit in range(count):
                for h in range(0, group, MAX_HEADS):
                    accumulate(
                        min(MAX_HEADS, group - h), weights_at + (h * block_width + unit * WIDTH) * element_bytes,
                        block_width, units[place + unit], units[place + unit + _AHEAD],
                        min(WIDTH, visible - unit * WIDTH), head_dim, sums_at + h * head_dim * 4,
                    )  # fmt: skip
            place += count
        for h in range(group):
            shrink(sums_at + h * head_dim * 4, head_dim // WIDTH, np.float32(1.0) / kept[2 * h + 1])
        store(out_words, group * head_dim, out, (row * num_heads + first_head) * head_dim)
    # numba frees an array after its last mention, and an address does not count as one.
    scores[0] = kept[0] = np.float32(0.0)
    weights[0] = 0
