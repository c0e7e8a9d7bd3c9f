"""An exchange through shared memory, compiled: it waits and sums without holding the interpreter lock.

Its rules and arguments are those of parallel/exchange.py. Each wait polls a bounded number of times.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools

import numba
import numpy as np

from shardray.parallel.exchange import ALL_SLOTS, ARRIVED, BEGUN, DONE, LINE_BYTES, NOTHING, SUM_FLOAT32, Exchange
from shardray.parallel.kernels import atomics, jit
from shardray.parallel.kernels.vector import copy_bytes

_OUTCOME = 13  # place in a block
_BLOCK = 512  # elements summed at a time, in the first-level cache


@numba.njit(inline="always", error_model="numpy")
def _reached(counters, step, first, end, num_spins, num_cycles):
    """Whether the counters of the ranks first .. end - 1 reach ``step`` soon enough."""
    polls, began = 0, np.int64(0)
    for rank in range(first, end):
        while atomics.load_acquire(counters + rank * LINE_BYTES) < step:
            if polls < num_spins:
                polls += 1
                atomics.pause()
                continue
            now = atomics.cycles()
            if began == 0:
                began = now
            elif now - began > num_cycles:
                return False
            atomics.give_up_core()
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
    a = numba.carray(args, (15,))
    finished, counters, rank, size, buffers, capacity = jit.pointer_i64(a[1]), a[2], a[3], a[4], a[9], a[10]
    num_spins, num_cycles, source, num_bytes, outcome, out = a[7], a[8], a[11], a[12], a[_OUTCOME], a[14]
    step = finished[0] + 1
    slots = buffers + (step & 1) * size * capacity
    if a[0] == BEGUN:
        if not _reached(counters, step - 1, 0, size, num_spins, num_cycles):
            return
        copy_bytes(slots + rank * capacity, source, num_bytes)
        atomics.store_release(counters + rank * LINE_BYTES, step)
        a[0] = ARRIVED
    if not _reached(counters, step, a[5], a[6], num_spins, num_cycles):
        return
    if outcome == ALL_SLOTS:
        for other in range(size):
            copy_bytes(out + other * num_bytes, slots + other * capacity, num_bytes)
    elif outcome != NOTHING:
        _sum(slots, capacity, size, out, num_bytes, outcome)
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
        name = "all_gather" if block[_OUTCOME] == ALL_SLOTS else "all_reduce"
        jit.record(jit.Launch(function, block.tobytes(), wait=wait, name=name))

    return exchange
