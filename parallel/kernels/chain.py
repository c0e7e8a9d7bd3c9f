"""The compiled part of a program (see parallel/kernels/program.py): one launch after the other, by a team of threads.

Every thread of the team goes through all launches by itself. A launch is over once its tasks are done, whoever did
them; a thread that is off its core between two tasks is not waited for, and catches up later by passing over what is
done. So nobody joins and nobody leads, and whoever else needs a core for a moment (the driver, a client on the same
machine) is offered one where that costs little: the other threads do the work meanwhile.

    mark of a launch   | int64: how many threads are inside it | int64: OPEN, OVER or LATE |   a cache line each
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.exchange import DONE
from shardray.parallel.kernels import atomics, jit
from shardray.parallel.kernels.jit import Function
from shardray.parallel.kernels.vector import I64

OPEN, OVER, LATE = 0, 1, 2  # LATE: it has to wait for other ranks, which is not done here
MARK_WORDS = 8
_OFFER_EVERY = 10  # launches: about once a layer a thread of several offers its core to whoever waits for it
_NUM_SPINS = 2000  # polls that keep the core, some 50 microseconds; those that follow offer it to others


@intrinsic
def _call(typing_context, function, block):
    """function(block), both addresses"""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(operands[0], kind.as_pointer()), [operands[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@numba.njit(inline="always")
def _wait(polls):
    if polls < _NUM_SPINS:
        atomics.pause()
    else:
        atomics.give_up_core()
    return polls + 1


def _run_launches(args):
    """args: threads of the team, launch to start with, end, launches, marks, where it came to (the end, as it is given)

    Launches are (function, block, threads, whether it may have to wait). All threads return once the last is over or
    one is late; that one is where it came to, and its block says how far.

    A thread that is let into a launch after its last task was taken finds none. One that took a task was counted
    inside before it took it; so whoever finds no task left, and then nobody inside, knows that all are done.
    """
    a = numba.carray(args, (6,))
    launches = numba.carray(jit.pointer_i64(a[3]), (a[2], 4))
    for i in range(a[1], a[2]):
        inside, state = a[4] + i * MARK_WORDS * 8, a[4] + i * MARK_WORDS * 8 + 8
        function, block = launches[i, 0], launches[i, 1]
        polls = 0
        if a[0] > 1 and i % _OFFER_EVERY == 0:
            atomics.give_up_core()
        if atomics.load_acquire(state) == OPEN:
            if launches[i, 2] > 1:
                atomics.add(inside, 1)
                _call(function, block)
                atomics.add(inside, -1)
                while atomics.load_acquire(inside) > 0 and atomics.load_acquire(state) == OPEN:
                    polls = _wait(polls)
                atomics.store_release(state, OVER)
            elif atomics.add(inside, 1) == 0:
                _call(function, block)
                is_late = launches[i, 3] != 0 and jit.pointer_i64(block)[0] != DONE
                if is_late:
                    a[5] = i
                atomics.store_release(state, LATE if is_late else OVER)
            else:
                while atomics.load_acquire(state) == OPEN:
                    polls = _wait(polls)
        if atomics.load_acquire(state) == LATE:
            return


@functools.cache
def compile_chain() -> Function:
    return jit.compile_function(_run_launches)
