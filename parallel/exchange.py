"""The rules by which ranks of one machine exchange bytes through shared memory.

    segment   | counters: one int64 per rank | 2 buffers x size slots of capacity bytes |

Operation k uses buffer k mod 2. A rank writes its slot, then sets its counter to k; whoever needs the slot polls the
counter. A counter of k also says that the rank has finished reading operation k - 1. So operation k begins when every
counter has reached k - 1: then nobody reads operation k - 2 any more, whose buffer it overwrites. It follows that no
rank is ever more than one operation ahead of another, whatever the mix of operations.

An exchange is this rank's part of one operation, described by a block of numbers (see ``block``). When the others are
not there yet, it waits in a function that it is given, which looks after aborts and deadlines. The compiled exchange in
``kernels/collective.py`` polls for a while before that, without the interpreter lock, and writes what comes of it. What
is here does neither, and runs where numba is not installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from array import array
from collections.abc import Callable

BEGUN, ARRIVED, DONE = 0, 1, 2  # how far an exchange came: nowhere; its bytes are there for the others; to its end
NOTHING, SUM_FLOAT32, SUM_BFLOAT16, ALL_SLOTS = 0, 1, 2, 3  # what an exchange writes
LINE_BYTES = 64  # between counters, so that they share no cache line

Wait = Callable[[int], None]  # (how far it came): returns once there is hope that it comes further
Exchange = Callable[["array[int]", Wait], None]  # (block, wait): carries it out


def block(
    finished: int,  # address of the number of operations that this rank has finished
    counters: int,  # address
    rank: int,
    size: int,  # number of ranks
    first: int,  # the slots first .. end - 1 are awaited
    end: int,
    num_spins: int,  # polls of each wait that keep the core
    num_cycles: int,  # of the processor's clock, in which polls that give it up follow
    buffers: int,  # address of both
    capacity: int,  # bytes of a slot
    source: int,  # address of what this rank brings
    num_bytes: int,
    outcome: int,  # what is written to ``out``: nothing, the sum over the slots in some dtype, or all slots
    out: int,  # address
) -> array[int]:
    """The numbers of an exchange; the first of them says how far it came."""
    return array(
        "q",
        (BEGUN, finished, counters, rank, size, first, end, num_spins, num_cycles, buffers, capacity, source, num_bytes,
         outcome, out),
    )  # fmt: skip


def exchange(block: array[int], wait: Wait) -> None:
    """Without numba. Relies on x86-64's store order."""
    while (progress := _go_on(*block)) != DONE:
        block[0] = progress
        wait(progress)


def _go_on(
    progress: int, finished: int, counters: int, rank: int, size: int, first: int, end: int, num_spins: int,
    num_cycles: int, buffers: int, capacity: int, source: int, num_bytes: int, outcome: int, out: int,
) -> int:  # fmt: skip
    count = ctypes.c_int64.from_address(finished)
    step = count.value + 1
    if progress == BEGUN:
        if not _reached(counters, step - 1, 0, size):
            return BEGUN
        ctypes.memmove(buffers + ((step & 1) * size + rank) * capacity, source, num_bytes)
        _counter(counters, rank).value = step
    if not _reached(counters, step, first, end):
        return ARRIVED
    count.value = step
    return DONE


def choose_exchange() -> tuple[Exchange, bool]:
    """The fastest exchange there is, and whether it is the compiled one: that it polls, and writes."""
    if importlib.util.find_spec("numba") is None:
        return exchange, False
    from shardray.parallel.kernels import collective

    return collective.compile_exchange(), True


def _reached(counters: int, step: int, first: int, end: int) -> bool:
    return all(_counter(counters, rank).value >= step for rank in range(first, end))


def _counter(counters: int, rank: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(counters + rank * LINE_BYTES)
