"""The product with weights of 8 bits: a thread rounds the tokens of a span to 8 bits before it multiplies them."""

# mypy: ignore-errors
# (numba's dialect)

from __future__ import annotations

import functools

import numba

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.int8_tile import GROUP, GROUP_BYTES, QUADS, QUADS_AT_ONCE, SHORTS, Int8Tile
from shardray.parallel.kernels.product import Variant
from shardray.parallel.kernels.rounding import round_bfloat16, round_float32
from shardray.parallel.kernels.tile import make_tile
from shardray.parallel.kernels.vector import VECTOR_BYTES, WIDTH


@numba.njit(inline="always")
def _row_bytes(num_words):
    return num_words // QUADS * GROUP_BYTES


@numba.njit(inline="always")
def _num_scratch(num_rows, num_words):
    return num_rows * _row_bytes(num_words) // 4 + GROUP  # and a group of x


@numba.njit(inline="always")
def _round(x_at, is_wide, group_at):
    if is_wide:
        round_float32(x_at, group_at)
    else:
        round_bfloat16(x_at, group_at)


@numba.njit(inline="always")
def _ready(a, first_token, num_rows, scratch_at):
    num_inputs, is_wide = a[10], a[11] != 0
    item_bytes, row_bytes = 4 if is_wide else 2, _row_bytes(a[6])
    last, rest = num_inputs // GROUP, num_inputs % GROUP
    filled_at = scratch_at + num_rows * row_bytes  # of inputs that do not fill a group, with zeros behind them
    for row in range(num_rows):
        x_at, row_at = a[2] + (first_token + row) * num_inputs * item_bytes, scratch_at + row * row_bytes
        for group in range(last):
            _round(x_at + group * GROUP * item_bytes, is_wide, row_at + group * GROUP_BYTES)
        if rest > 0:
            vector.clear(filled_at, GROUP * 4 // VECTOR_BYTES)
            vector.copy_bytes(filled_at, x_at + last * GROUP * item_bytes, rest * item_bytes)
            _round(filled_at, is_wide, row_at + last * GROUP_BYTES)
    return scratch_at


@numba.njit(inline="always")
def _begin(a, first_vector, vectors, num_rows, sums_at):
    vector.clear(sums_at, num_rows * vectors)


@numba.njit(inline="always")
def _end(a, first_vector, vectors, num_rows, sums_at):
    scales, bias, sums = jit.pointer_f32(a[12]), jit.pointer_f32(a[8]), jit.pointer_f32(sums_at)
    first, width = first_vector * WIDTH, vectors * WIDTH
    for row in range(num_rows):
        for i in range(width):
            sums[row * width + i] = sums[row * width + i] * scales[first + i] + bias[first + i]


@functools.cache
def make_variant(name: str) -> Variant:
    """``quads``: AVX-512 that multiplies 8-bit numbers. ``shorts``: any AVX-512. ``narrow``: less room in registers."""
    vectors, rows = (2, 2) if name == "narrow" else (3, 4)
    tile = make_tile(QUADS_AT_ONCE if name == "quads" else SHORTS, rows, vectors, Int8Tile)
    return Variant(f"int8_{name}", vectors, rows, tile, _row_bytes, _num_scratch, _ready, _begin, _end)
