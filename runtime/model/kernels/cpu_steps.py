"""A step of decodes laid out, compiled: what SlotTable.lay_out gives of rows of one token that sample."""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools

import numba

from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import Kernel


def lay_out_decodes(args):
    """args: counter, R, b, blocks of a slot, pages (slots, blocks) int32, rows (R, 3): slot, start and token; then what
    is written: token ids, positions, cache index, slots, context lens int32, sampled tokens, sampling slots (R,),
    blocks of a row, block tables (R, blocks) int32. All else is int64.
    """
    a = numba.carray(args, (15,))
    num_rows, block_size = a[1], a[2]
    pages, rows = jit.pointer_i32(a[4]), numba.carray(jit.pointer_i64(a[5]), (num_rows, 3))
    token_ids, positions, cache_index = jit.pointer_i64(a[6]), jit.pointer_i64(a[7]), jit.pointer_i64(a[8])
    slots, context_lens, sampled = jit.pointer_i64(a[9]), jit.pointer_i32(a[10]), jit.pointer_i64(a[11])
    sampling_slots, tables = jit.pointer_i64(a[12]), jit.pointer_i32(a[14])
    for i in range(num_rows):
        slot, start, own = rows[i, 0], rows[i, 1], rows[i, 0] * a[3]
        block = start // block_size
        token_ids[i] = rows[i, 2]
        positions[i] = start
        cache_index[i] = pages[own + block] * block_size + start % block_size
        slots[i] = sampling_slots[i] = slot
        context_lens[i] = start + 1
        sampled[i] = i
        for j in range(block + 1):
            tables[i * a[13] + j] = pages[own + j]


@functools.cache
def compile_lay_out() -> Kernel:
    return jit.compile_kernel(lay_out_decodes)
