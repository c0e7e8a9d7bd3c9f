"""Draws a column of each row of scores on CPUs, compiled: the filters' cut without a sort, the race without logarithms.

Both look closely at few columns of a vocabulary. ``candidates.py`` and ``race.py`` say what is drawn.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools
import math

import numba
import numpy as np

from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import Kernel
from shardray.parallel.kernels.rows import in_order
from shardray.runtime.engine.noise import LOWBIAS_1, LOWBIAS_2, UNIT

_BLOCK = 64  # columns that are compared at a time
_LOG2_E = 1.0 / math.log(2.0)
_FACTOR_1, _FACTOR_2 = np.uint32(LOWBIAS_1), np.uint32(LOWBIAS_2 & 0xFFFFFFFF)
_SLACK = 1.0 - 1e-6  # for the rounding of float32
_NUM_SHELVES, _SHELVES_PER_UNIT = 256, 8.0  # of scores over temperature; the last one has all below -31.9


@numba.njit(inline="always")
def _noise_bits(hashed, first, second):
    """31 bits: see noise.py."""
    word = np.uint32(hashed ^ first)
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) * _FACTOR_1)
    word = np.uint32(word ^ second)
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(15))) * _FACTOR_2)
    return np.int32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) & np.uint32(0x7FFFFFFF))


@numba.njit(inline="always")
def _noise(hashed, first, second):
    return -math.log1p(-UNIT * (float(np.float32(_noise_bits(hashed, first, second))) + 0.5))


@numba.njit(inline="always")
def _shelf(score, top, scale):
    return np.int64(min((top - score) * scale, np.float32(_NUM_SHELVES - 1)))


@numba.njit
def _sink(heap, size, place):
    """Restore a heap, the least on top, whose value at ``place`` may be too great."""
    value = heap[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@numba.njit
def _put_on_shelves(scores, start, num_columns, top, scale, temperature, counts, masses):
    """Of each shelf the columns, and the weight of all together."""
    counts[:], masses[:] = 0, 0.0
    weights = np.empty(_BLOCK, np.float32)
    rate = np.float32(1.0 / temperature)
    for block in range(0, num_columns, _BLOCK):
        count = min(_BLOCK, num_columns - block)
        for i in range(count):
            weights[i] = jit.exp((scores[start + block + i] - top) * rate)
        for i in range(count):
            shelf = _shelf(scores[start + block + i], top, scale)
            counts[shelf] += 1
            masses[shelf] += weights[i]


@numba.njit
def _last_kept(scores, bits, start, num_columns, top, scale, temperature, counts, masses, heap, most, mass):
    """The column of the last of the best ones, which are ``most``, with all that equal the last, or weigh ``mass``; and
    what they weigh. Of equal ones the lower column comes first. Column -1: not even all do.
    """
    shelf, num_kept, kept_mass = 0, 0, 0.0
    while shelf < _NUM_SHELVES - 1 and num_kept + counts[shelf] < most and kept_mass + masses[shelf] < mass:
        num_kept += counts[shelf]
        kept_mass += masses[shelf]
        shelf += 1
    size = 0
    for i in range(num_columns):
        if _shelf(scores[start + i], top, scale) == shelf:
            heap[size] = (np.int64(~in_order(bits[start + i])) << 32) | i
            size += 1
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap, size, place)
    last = np.int64(-1)
    while size > 0 and kept_mass < mass and (num_kept < most or heap[0] >> 32 == last >> 32):
        last = heap[0]
        num_kept += 1
        kept_mass += math.exp((float(scores[start + (last & 0xFFFFFFFF)]) - float(top)) / temperature)
        size -= 1
        heap[0] = heap[size]
        _sink(heap, size, 0)
    return (last & 0xFFFFFFFF if num_kept >= most or kept_mass >= mass else -1), kept_mass


@numba.njit
def _cut(scores, bits, start, num_columns, top, temperature, top_k, top_p, min_p):
    """(score, column) of the last one that the filters keep: see candidates.py."""
    cut, last = -np.inf, num_columns
    if top_k > 0 or top_p < 1.0:
        counts, masses = np.empty(_NUM_SHELVES, np.int64), np.empty(_NUM_SHELVES, np.float64)
        heap, scale = np.empty(num_columns, np.int64), np.float32(_SHELVES_PER_UNIT / temperature)
        _put_on_shelves(scores, start, num_columns, top, scale, temperature, counts, masses)
        mass = masses.sum()
        if top_k > 0:
            column, mass = _last_kept(
                scores, bits, start, num_columns, top, scale, temperature, counts, masses, heap, top_k, np.inf
            )
            if column >= 0:
                cut, last = float(scores[start + column]), num_columns
        if top_p < 1.0:
            column, _ = _last_kept(
                scores, bits, start, num_columns, top, scale, temperature, counts, masses, heap, num_columns + 1,
                top_p * mass,
            )  # fmt: skip
            if column >= 0 and float(scores[start + column]) >= cut:
                cut, last = float(scores[start + column]), column
    floor = float(top) + temperature * math.log(min_p) if min_p > 0.0 else -np.inf
    return (floor, num_columns) if floor > cut else (cut, last)


def draw(args):
    """args: counter, T, V, scores (T, V) float32, hashed ids (V,) and keys (T, 2) uint32, params (T, 4) float64 of
    temperature, top_k (0: off), top_p and min_p; out (T,) int64, cuts (T, 2) float64.

    Of the columns that the filters keep, the one of the highest exp(score / temperature) / noise; of a cut, score and
    column of the last that is kept, of equal ones those up to that column; column -1 if the row is not finite.

    The noise of 31 bits is at least these times UNIT, and 2 ** y below 2 ** (1 + the whole part of y): where that is
    not above the best so far, it is not looked at closely.
    """
    a = numba.carray(args, (9,))
    num_columns, bits, scores = a[2], jit.pointer_i32(a[3]), jit.pointer_f32(a[3])
    hashed, keys, params = jit.pointer_u32(a[4]), jit.pointer_u32(a[5]), jit.pointer_f64(a[6])
    out, cuts = jit.pointer_i64(a[7]), jit.pointer_f64(a[8])
    while True:
        row = jit.take_task(args)
        if row >= a[1]:
            break
        start, first, second, temperature = row * num_columns, keys[2 * row], keys[2 * row + 1], params[4 * row]
        highest = np.int32(-0x80000000)
        for i in range(num_columns):
            highest = max(highest, in_order(bits[start + i]))
        winner = 0
        while winner + 1 < num_columns and in_order(bits[start + winner]) != highest:
            winner += 1
        top, scale = scores[start + winner], np.float32(_LOG2_E / temperature)
        if not abs(top) < np.inf:
            out[row], cuts[2 * row], cuts[2 * row + 1] = winner, -np.inf, num_columns if top < 0.0 else -1
            continue
        cut, last = _cut(
            scores, bits, start, num_columns, top, temperature, params[4 * row + 1], params[4 * row + 2],
            params[4 * row + 3],
        )  # fmt: skip
        best = 1.0 / _noise(hashed[winner], first, second)
        bound = np.float32(best * UNIT * _SLACK)
        for block in range(0, num_columns, _BLOCK):
            end, num_close = min(block + _BLOCK, num_columns), np.int32(0)
            for i in range(block, end):
                y = max((scores[start + i] - top) * scale, np.float32(-120.0))
                above = jit.float_of((np.int32(y) + np.int32(128)) << np.int32(23))
                num_close += np.int32(above >= bound * np.float32(_noise_bits(hashed[i], first, second)))
            for i in range(block, end if num_close else block):
                score = float(scores[start + i])
                if score < cut or (score == cut and i > last):
                    continue
                value = math.exp((score - float(top)) / temperature) / _noise(hashed[i], first, second)
                if value > best or (value == best and i < winner):
                    best, winner = value, i
                    bound = np.float32(best * UNIT * _SLACK)
        out[row], cuts[2 * row], cuts[2 * row + 1] = winner, cut, last


@functools.cache
def compile_draw() -> Kernel:
    return jit.compile_kernel(draw)
