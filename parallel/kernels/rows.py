"""What stands around the layers of a step on CPUs, compiled: rows of tables, and the best column of rows.

Each runs on one thread, but ``best_columns``. Sizes and addresses are in bytes.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools
from typing import NamedTuple

import numba
import numpy as np

from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import Kernel
from shardray.parallel.kernels.vector import copy_bytes

_BLOCK = 1024  # columns looked through at a time


def take_rows(args):
    """args: counter, T, size, index (T,), first, R, table (R, size), out (T, size).  out[i] = table[index[i] - first]

    Rows that are not among the R from ``first`` on are zeros.
    """
    a = numba.carray(args, (8,))
    count, size, index, table, out = a[1], a[2], jit.pointer_i64(a[3]), a[6], a[7]
    for i in range(count):
        row = index[i] - a[4]
        if 0 <= row < a[5]:
            copy_bytes(out + i * size, table + row * size, size)
        else:
            zeros = jit.pointer_u16(out + i * size)
            for j in range(size // 2):
                zeros[j] = 0


def put_words(args):
    """args: counter, T, index (T,), values (T,), table.  table[index[i]] = max(values[i], 0), all int64"""
    a = numba.carray(args, (5,))
    index, values, table = jit.pointer_i64(a[2]), jit.pointer_i64(a[3]), jit.pointer_i64(a[4])
    for i in range(a[1]):
        table[index[i]] = max(values[i], 0)


def fill_in(args):
    """args: counter, T, missing, values (T,), index, table, out (T,), all int64.

    out[i] = values[i], or table[index[i]] where that is ``missing``; elsewhere index[i] is not read.
    """
    a = numba.carray(args, (7,))
    values, index = jit.pointer_i64(a[3]), jit.pointer_i64(a[4])
    table, out = jit.pointer_i64(a[5]), jit.pointer_i64(a[6])
    for i in range(a[1]):
        out[i] = table[index[i]] if values[i] == a[2] else values[i]


@numba.njit(inline="always")
def in_order(bits):
    """int32 that are in the order of the floats of those bits; both zeros are equal, and NaN is above all."""
    sign, size = bits >> np.int32(31), bits & np.int32(0x7FFFFFFF)
    return np.int32(0x7FFFFFFF) if size > np.int32(0x7F800000) else (size ^ sign) - sign


def best_columns(args):
    """args: counter, T, V, first, scores (T, V) float32, out (T, 2) float64: the highest score, its column + first.

    Of equal ones the first column counts. A NaN counts as the highest.
    """
    a = numba.carray(args, (6,))
    num_columns, scores, out = a[2], jit.pointer_i32(a[4]), numba.carray(jit.pointer_f64(a[5]), (a[1], 2))
    while True:
        row = jit.take_task(args)
        if row >= a[1]:
            break
        start = row * num_columns
        best, best_block = np.int32(-0x80000000), 0
        for block in range(0, num_columns, _BLOCK):
            highest = np.int32(-0x80000000)
            for i in range(block, min(block + _BLOCK, num_columns)):
                highest = max(highest, in_order(scores[start + i]))
            if highest > best:
                best, best_block = highest, block
        column = best_block
        while column + 1 < num_columns and in_order(scores[start + column]) != best:
            column += 1
        out[row, 0] = jit.pointer_f32(a[4])[start + column] if num_columns else -np.inf
        out[row, 1] = a[3] + column


def pick_best(args):
    """args: counter, ranks, T, pairs (ranks, T, 2) float64, out (T,) int64: of the highest first the second.

    Of equal ones that of the lowest rank; -1 where the highest is not finite, or NaN.
    """
    a = numba.carray(args, (5,))
    pairs, out = numba.carray(jit.pointer_f64(a[3]), (a[1], a[2], 2)), jit.pointer_i64(a[4])
    for row in range(a[2]):
        best = 0
        for rank in range(1, a[1]):
            if pairs[rank, row, 0] > pairs[best, row, 0] or np.isnan(pairs[rank, row, 0]):
                best = rank
        out[row] = np.int64(pairs[best, row, 1]) if pairs[best, row, 0] < np.inf else -1


class Kernels(NamedTuple):
    """All of them."""

    take_rows: Kernel
    put_words: Kernel
    fill_in: Kernel
    best_columns: Kernel
    pick_best: Kernel


@functools.cache
def compile_rows() -> Kernels:
    functions = take_rows, put_words, fill_in, best_columns, pick_best
    return Kernels(*(jit.compile_kernel(function) for function in functions))
