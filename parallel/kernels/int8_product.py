"""The product with weights of 8 bits: a thread rounds the tokens of a span to 8 bits before it multiplies them.

a row    [float32 scale of each group] [int32 start of each] [64 int8 of each]
"""

# mypy: ignore-errors
# (numba's dialect)

from __future__ import annotations

import functools

import numba

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.int8_tile import GROUP, QUADS, QUADS_AT_ONCE, SHORTS, make_tile
from shardray.parallel.kernels.product import Variant
from shardray.parallel.kernels.rounding import round_bfloat16, round_float32
from shardray.parallel.kernels.vector import VECTOR_BYTES, WIDTH


@numba.njit(inline="always")
def _row_bytes(num_words):
    return num_words // QUADS * (GROUP + 8)


@numba.njit(inline="always")
def _num_scratch(num_rows, num_words):
    return num_rows * _row_bytes(num_words) // 4 + GROUP  # and a group of x


@numba.njit(inline="always")
def _round(x_at, is_wide, row_at, group, num_groups):
    scale_at = row_at + group * 4
    start_at, values_at = scale_at + num_groups * 4, row_at + num_groups * 8 + group * GROUP
    if is_wide:
        round_float32(x_at, values_at, scale_at, start_at)
    else:
        round_bfloat16(x_at, values_at, scale_at, start_at)


@numba.njit(inline="always")
def _ready(a, first_token, num_rows, scratch_at):
    num_groups, num_inputs, is_wide = a[6] // QUADS, a[10], a[11] != 0
    item_bytes, row_bytes = 4 if is_wide else 2, _row_bytes(a[6])
    last, rest = num_inputs // GROUP, num_inputs % GROUP
    filled_at = scratch_at + num_rows * row_bytes  # of inputs that do not fill a group, with zeros behind them
    for row in range(num_rows):
        x_at, row_at = a[2] + (first_token + row) * num_inputs * item_bytes, scratch_at + row * row_bytes
        for group in range(last):
            _round(x_at + group * GROUP * item_bytes, is_wide, row_at, group, num_groups)
        if rest > 0:
            vector.clear(filled_at, GROUP * 4 // VECTOR_BYTES)
            vector.copy_bytes(filled_at, x_at + last * GROUP * item_bytes, rest * item_bytes)
            _round(filled_at, is_wide, row_at, last, num_groups)
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
    tile = make_tile(QUADS_AT_ONCE if name == "quads" else SHORTS, rows, vectors)

    @numba.njit(inline="always")
    def add(num_rows, vectors, rows_at, num_words, first_word, count, weights_at, sums_at, ahead_at, lines):
        num_groups, first = num_words // QUADS, first_word // QUADS
        scales_at, values_at = rows_at + first * 4, rows_at + num_groups * 8 + first * GROUP
        tile(
            num_rows, vectors, values_at, scales_at, scales_at + num_groups * 4, num_groups * (GROUP + 8), weights_at,
            count // QUADS, sums_at, ahead_at, lines * VECTOR_BYTES,
        )  # fmt: skip

    return Variant(f"int8_{name}", vectors, rows, _row_bytes, _num_scratch, _ready, _begin, add, _end)
