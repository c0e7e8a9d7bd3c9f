"""Flash attention of prompts over pages, on CPUs, in bfloat16: its two products are the tiles of the linears.

A task is a few tokens of one row with all query heads of one KV head. It walks over the context in blocks of two tiles
and brings each block into the layout of a linear's weights (see parallel/kernels/linear.py): keys as (d, tokens), then
values as (tokens, d). Sums are float32; the weights of the softmax enter the second product as bfloat16. Blocks begin
at multiples of their size, so a token's result depends on its own context alone: not on how its prompt was cut into
chunks, nor on who shares the step.

Legend: n / g query and KV heads, d head size, b tokens a page, W blocks in a row of the block table.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars, names bound when a kernel is compiled)

from __future__ import annotations

import functools
from typing import NamedTuple

import numba
import numpy as np

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.pairs_product import make_pairs_tile
from shardray.parallel.kernels.product import block_at, count_blocks
from shardray.parallel.kernels.vector import VECTOR_BYTES, WIDTH
from shardray.runtime.model.kernels.flash_tiles import TILES, fill, interleave, make_soften, make_top, shrink

_LINE_BYTES = 64


class Variant(NamedTuple):
    """Attention for one kind of processor: what the names below stand for."""

    name: str
    tile_vectors: int  # of 16 tokens or elements of a head, side by side in a tile
    top: object
    top_all: object
    soften: object
    soften_all: object
    multiply_rows: object
    multiply_head: object
    shrink_row: object
    write_row: object
    pack_keys: object
    pack_values: object


tile_vectors = 0
top = top_all = soften = soften_all = multiply_rows = multiply_head = shrink_row = write_row = None
pack_keys = pack_values = None  # all of these: a variant's


@functools.cache
def make_variant(name: str) -> Variant:
    """See parallel/kernels/pairs_product.py for the names."""
    vectors, max_rows, multiply = make_pairs_tile(name)

    @numba.njit(fastmath=jit.MATH)
    def multiply_rows(num_rows, num_vectors, x, row_bytes, weights, num_pairs, sums):
        """sums (rows, 16 * num_vectors) += x @ weights, tile by tile"""
        num_tiles = (num_rows - 1) // max_rows + 1
        for tile in range(num_tiles):
            row, next_row = num_rows * tile // num_tiles, num_rows * (tile + 1) // num_tiles
            place = sums + row * num_vectors * VECTOR_BYTES
            multiply(next_row - row, num_vectors, x + row * row_bytes, row_bytes, weights, num_pairs, place, weights, 0)

    # A head's vectors lie in blocks as the outputs of a product do. ``v`` is the first of one of ``side``.

    @numba.njit(fastmath=jit.MATH)
    def multiply_head(num_rows, head_vectors, x, row_bytes, weights, num_pairs, sums):
        """As ``multiply_rows``, for all vectors of a head"""
        for block in range(count_blocks(head_vectors, vectors)):
            v, side = block_at(block, head_vectors, vectors)
            source, place = weights + v * num_pairs * VECTOR_BYTES, sums + v * num_rows * VECTOR_BYTES
            multiply_rows(num_rows, side, x, row_bytes, source, num_pairs, place)

    @numba.njit
    def shrink_row(sums, row, num_rows, head_vectors, factor):
        for block in range(count_blocks(head_vectors, vectors)):
            v, side = block_at(block, head_vectors, vectors)
            shrink(sums + (v * num_rows + row * side) * VECTOR_BYTES, side, factor)

    @numba.njit
    def write_row(sums, row, num_rows, head_vectors, out):
        """One row's sums as bfloat16"""
        for block in range(count_blocks(head_vectors, vectors)):
            v, side = block_at(block, head_vectors, vectors)
            vector.narrow(sums + (v * num_rows + row * side) * VECTOR_BYTES, side, out + v * WIDTH * 2)

    @numba.njit
    def pack_keys(keys, row_bytes, num_pairs, target):
        """Sixteen tokens of a (d, b) tile, pair by pair"""
        for pair in range(num_pairs):
            row = keys + 2 * pair * row_bytes
            interleave(row, row + row_bytes, target + pair * vectors * VECTOR_BYTES)

    @numba.njit
    def pack_values(first, second, num_vectors, pair, num_pairs, target):
        """Two tokens of a (b, d) tile"""
        for block in range(count_blocks(num_vectors, vectors)):
            v, side = block_at(block, num_vectors, vectors)
            place = target + (v * num_pairs + pair * side) * VECTOR_BYTES
            for i in range(side):
                offset = (v + i) * WIDTH * 2
                interleave(first + offset, second + offset, place + i * VECTOR_BYTES)

    steps = (make(vectors, TILES, all_visible) for make in (make_top, make_soften) for all_visible in (False, True))
    return Variant(name, vectors, *steps, multiply_rows, multiply_head, shrink_row, write_row, pack_keys, pack_values)


@numba.njit
def _tasks_of(row_list, listed, tokens_a_task, num_kv_heads):
    return ((row_list[listed * 4 + 2] - 1) // tokens_a_task + 1) * num_kv_heads


@numba.njit
def _find(row_list, tokens_a_task, num_kv_heads, task):
    """Where the row that a task belongs to is listed, and which one of that row's tasks it is"""
    listed = 1
    while task >= _tasks_of(row_list, listed, tokens_a_task, num_kv_heads):
        task -= _tasks_of(row_list, listed, tokens_a_task, num_kv_heads)
        listed += 1
    return listed, task


@numba.njit
def _copy(source, num_words, target):
    """32-bit words from one address to another"""
    here, there = jit.pointer_u32(source), jit.pointer_u32(target)
    for i in range(num_words):
        there[i] = here[i]


def prefill(args):
    """args: row list, n, g, d, b, W, queries, row stride, keys, values, block tables, groups, out, scale,
    tokens a task, rows of a task at most, whether causal

    The row list (see runtime/model/attention.py) says how many rows of several tokens there are, and of each its row
    of the table, first token, tokens and context length. ``groups`` is (g + 1,) int64: query heads
    [groups[i], groups[i + 1]) read KV head i. ``scale``, the address of a float32, makes exponents of two of scores.
    Tensors are contiguous but for the rows of ``queries``; out is (T, n, d). b and d are multiples of 16.
    """
    a = numba.carray(args, (18,))
    row_list, num_heads, num_kv_heads, head_dim, block_size = jit.pointer_i64(a[1]), a[2], a[3], a[4], a[5]
    queries, row_stride, keys, values, tables = a[7], a[8], a[9], a[10], jit.pointer_i32(a[11])
    groups, out, scale = jit.pointer_i64(a[12]), a[13], jit.pointer_f32(a[14])[0]
    tokens_a_task, most_rows, is_causal = a[15], a[16], a[17] != 0
    num_tasks = 0
    for listed in range(1, row_list[1] + 1):
        num_tasks += _tasks_of(row_list, listed, tokens_a_task, num_kv_heads)
    tile_width, block_width = tile_vectors * WIDTH, TILES * tile_vectors * WIDTH
    head_vectors, num_pairs, page_bytes = head_dim // WIDTH, head_dim // 2, block_size * head_dim * 2
    # Of each row: its query, its scores and weights of a block, its sums, and what is kept of it
    row_bytes = np.array([head_dim * 2, block_width * 4, block_width * 2, head_dim * 4, _LINE_BYTES])
    rows_bytes = most_rows * row_bytes
    block_bytes = block_width * head_dim * 2
    scratch = np.zeros(rows_bytes.sum() + block_bytes + head_dim * 2 + _LINE_BYTES, np.uint8)
    query_at = (vector.address_of(scratch) + _LINE_BYTES - 1) // _LINE_BYTES * _LINE_BYTES
    scores_at = query_at + rows_bytes[0]
    weights_at = scores_at + rows_bytes[1]
    sums_at = weights_at + rows_bytes[2]
    kept_at = sums_at + rows_bytes[3]
    packed_at = kept_at + rows_bytes[4]
    zeros_at = packed_at + block_bytes
    kept, tops = jit.pointer_f32(kept_at), np.empty(WIDTH, np.float32)
    while True:
        task = num_tasks - 1 - jit.take_task(args)  # those with the longest contexts first
        if task < 0:
            break
        listed, task = _find(row_list, tokens_a_task, num_kv_heads, task)
        kv_head, first = task % num_kv_heads, task // num_kv_heads * tokens_a_task
        at = listed * 4
        table, num_new, context_len = row_list[at] * a[6], row_list[at + 2], row_list[at + 3]
        num_tokens = min(tokens_a_task, num_new - first)
        first_head, group = groups[kv_head], groups[kv_head + 1] - groups[kv_head]
        first_token, first_position = row_list[at + 1] + first, context_len - num_new + first
        num_rows = num_tokens * group
        if num_rows == 0:
            continue
        for i in range(num_tokens):
            source = queries + ((first_token + i) * row_stride + first_head * head_dim) * 2
            _copy(source, group * num_pairs, query_at + i * group * head_dim * 2)
        for i in range(num_rows):
            kept[2 * i], kept[2 * i + 1] = np.float32(-np.inf), np.float32(0.0)
        fill(sums_at, num_rows * head_vectors)
        scores_bytes = num_rows * tile_width * 4  # of a tile
        limit = min(context_len, first_position + num_tokens) if is_causal else context_len
        for start in range(0, limit, block_width):
            for tile in range(min(TILES, (limit - start - 1) // tile_width + 1)):  # scores = queries @ keys
                for v in range(tile_vectors):
                    token = start + tile * tile_width + v * WIDTH
                    if token < context_len:
                        page = np.int64(tables[table + token // block_size]) * num_kv_heads + kv_head
                        source = keys + page * page_bytes + token % block_size * 2
                        pack_keys(source, block_size * 2, num_pairs, packed_at + v * VECTOR_BYTES)
                place = scores_at + tile * scores_bytes
                fill(place, num_rows * tile_vectors)
                multiply_rows(num_rows, tile_vectors, query_at, head_dim * 2, packed_at, num_pairs, place)
            for some in range(0, num_rows, WIDTH):  # weights = softmax(scores), as far as it is known by now
                last = min(some + WIDTH, num_rows)
                for i in range(some, last):
                    visible = first_position + i // group + 1 - start if is_causal else context_len - start
                    row_at = scores_at + i * tile_width * 4
                    if visible < block_width:
                        tops[i - some] = top(row_at, scores_bytes, visible)
                    else:
                        tops[i - some] = top_all(row_at, scores_bytes, visible)
                for i in range(some, last):
                    visible = first_position + i // group + 1 - start if is_causal else context_len - start
                    row_at, weight_at = scores_at + i * tile_width * 4, weights_at + i * block_width * 2
                    highest, own = tops[i - some], kept_at + i * 8
                    if visible < block_width:
                        factor = soften(row_at, scores_bytes, visible, scale, highest, own, weight_at)
                    else:
                        factor = soften_all(row_at, scores_bytes, visible, scale, highest, own, weight_at)
                    if factor != np.float32(1.0):
                        shrink_row(sums_at, i, num_rows, head_vectors, factor)
            num_value_pairs = (min(block_width, limit - start) + 1) // 2  # sums += weights @ values
            for pair in range(num_value_pairs):
                token = start + 2 * pair
                page = np.int64(tables[table + token // block_size]) * num_kv_heads + kv_head
                source = values + page * page_bytes + token % block_size * head_dim * 2
                following = source + head_dim * 2 if token + 1 < limit else zeros_at
                pack_values(source, following, head_vectors, pair, num_value_pairs, packed_at)
            multiply_head(num_rows, head_vectors, weights_at, block_width * 2, packed_at, num_value_pairs, sums_at)
        for i in range(num_rows):
            shrink_row(sums_at, i, num_rows, head_vectors, np.float32(1.0) / kept[2 * i + 1])
            place = out + ((first_token + i // group) * num_heads + first_head + i % group) * head_dim * 2
            write_row(sums_at, i, num_rows, head_vectors, place)
    scratch[0] = np.uint8(0)  # numba frees an array after its last mention; its address does not count as one
