"""An exchange through shared memory, compiled: it waits and sums without holding the interpreter lock.

Its rules and arguments are those of parallel/exchange.py. Each wait polls a bounded number of times.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools
import platform

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shardray.parallel.exchange import ARRIVED, BEGUN, DONE, LINE_BYTES, NO_SUM, SUM_FLOAT32, Exchange
from shardray.parallel.kernels import jit

_BLOCK = 512  # elements summed at a time, in the first-level cache
_COUNTER = ir.IntType(64)


@intrinsic
def _load_acquire(typing_context, address):
    """The int64 at ``address``; what its writer wrote before it is seen by every read that follows."""

    def generate(context, builder, signature, operands):
        pointer = builder.inttoptr(operands[0], _COUNTER.as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(types.int64), generate


@intrinsic
def _store_release(typing_context, address, value):
    """Write an int64 after everything that was read and written before."""

    def generate(context, builder, signature, operands):
        pointer = builder.inttoptr(operands[0], _COUNTER.as_pointer())
        builder.store_atomic(operands[1], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _copy(typing_context, target, source, num_bytes):
    """memcpy between two addresses"""

    def generate(context, builder, signature, operands):
        target, source = (builder.inttoptr(operand, cgutils.voidptr_t) for operand in operands[:2])
        cgutils.raw_memcpy(builder, target, source, operands[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _pause(typing_context):
    """Tell the processor that this is a spin loop."""

    def generate(context, builder, signature, operands):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_up_core(typing_context):
    """sched_yield"""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _cycles(typing_context):
    """The processor's clock, which runs at about the same rate whatever the processor does."""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(_COUNTER, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@numba.njit(inline="always", error_model="numpy")
def _reached(counters, step, first, end, num_spins, num_cycles):
    """Whether the counters of the ranks first .. end - 1 reach ``step`` soon enough."""
    polls, began = 0, np.int64(0)
    for rank in range(first, end):
        while _load_acquire(counters + rank * LINE_BYTES) < step:
            if polls < num_spins:
                polls += 1
                _pause()
                continue
            now = _cycles()
            if began == 0:
                began = now
            elif now - began > num_cycles:
                return False
            _give_up_core()
    return True


@numba.njit(error_model="numpy")
def _sum(slots, capacity, size, out, num_bytes, sum_kind):
    """The sum over the slots, in float32 and in rank order, rounded once, written to ``out``."""
    words, more_words = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    total, part = words.view(np.float32), more_words.view(np.float32)
    num_elements = num_bytes // (4 if sum_kind == SUM_FLOAT32 else 2)
    for start in range(0, num_elements, _BLOCK):
        count = min(_BLOCK, num_elements - start)
        for rank in range(size):
            target = words if rank == 0 else more_words
            if sum_kind == SUM_FLOAT32:
                jit.copy_in(jit.pointer_u32(slots + rank * capacity), start, count, target)
            else:
                jit.widen(jit.pointer_u16(slots + rank * capacity), start, count, target)
            if rank > 0:
                for i in range(count):
                    total[i] += part[i]
        if sum_kind == SUM_FLOAT32:
            jit.copy_out(words, count, jit.pointer_u32(out), start)
        else:
            jit.narrow(words, count, jit.pointer_u16(out), start)


def _exchange(args):
    """args: see ``block`` in parallel/exchange.py"""
    a = numba.carray(args, (14,))
    finished, counters, rank, size, buffers, capacity = jit.pointer_i64(a[1]), a[2], a[3], a[4], a[9], a[10]
    num_spins, num_cycles, source, num_bytes, sum_kind = a[7], a[8], a[11], a[12], a[13]
    step = finished[0] + 1
    slots = buffers + (step & 1) * size * capacity
    if a[0] == BEGUN:
        if not _reached(counters, step - 1, 0, size, num_spins, num_cycles):
            return
        _copy(slots + rank * capacity, source, num_bytes)
        _store_release(counters + rank * LINE_BYTES, step)
        a[0] = ARRIVED
    if not _reached(counters, step, a[5], a[6], num_spins, num_cycles):
        return
    if sum_kind != NO_SUM:
        _sum(slots, capacity, size, source, num_bytes, sum_kind)
    finished[0] = step
    a[0] = DONE


@functools.cache
def compile_exchange() -> Exchange:
    """``_exchange`` as a Python callable that gives up the interpreter lock; compiled once, then cached on disk."""
    function = jit.compile_function(_exchange)

    def exchange(block, wait):
        address, _ = block.buffer_info()
        function.call(address)
        while block[0] != DONE:
            wait(block[0])
            function.call(address)
        jit.record(jit.Launch(function, block.tobytes(), wait=wait))

    return exchange
