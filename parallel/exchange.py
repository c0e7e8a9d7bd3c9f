"""The rules by which ranks of one machine exchange bytes through shared memory.

    segment   | counters: one int64 per rank | 2 buffers x size slots of capacity bytes |

Operation k uses buffer k mod 2. A rank writes its slot, then sets its counter to k; whoever needs the slot polls the
counter. A counter of k also says that the rank has finished reading operation k - 1. So operation k begins when every
counter has reached k - 1: then nobody reads operation k - 2 any more, whose buffer it overwrites. It follows that no
rank is ever more than one operation ahead of another, whatever the mix of operations.

An exchange is this rank's part of one operation. It never waits for long: it returns how far it came, and is called
again with that once there is hope that it comes further. ``kernels/collective.py`` holds the compiled one, which polls
for a while without the interpreter lock, and sums; what is here does neither, and runs where numba is not installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable

BEGUN, ARRIVED, DONE = 0, 1, 2  # how far an exchange came: nowhere; its bytes are there for the others; to its end
NO_SUM, SUM_FLOAT32, SUM_BFLOAT16 = 0, 1, 2
LINE_BYTES = 64  # between counters, so that they share no cache line

Exchange = Callable[..., int]  # see exchange


def exchange(
    progress: int,
    step: int,  # number of the operation
    counters: int,  # address
    rank: int,
    size: int,  # number of ranks
    first: int,  # the slots first .. end - 1 are awaited
    end: int,
    num_spins: int,  # polls of each wait that keep the core, and after them
    num_yields: int,  # polls that give it up
    slots: int,  # address of the operation's buffer
    capacity: int,  # bytes of a slot
    source: int,  # address of what this rank brings
    num_bytes: int,
    sum_kind: int,  # whether ``source`` becomes the sum over the slots, and of what dtype
) -> int:
    """Go on from ``progress`` with operation ``step``; returns how far it came. Relies on x86-64's store order."""
    if progress == BEGUN:
        if not _reached(counters, step - 1, 0, size):
            return BEGUN
        ctypes.memmove(slots + rank * capacity, source, num_bytes)
        _counter(counters, rank).value = step
    return DONE if _reached(counters, step, first, end) else ARRIVED


def choose_exchange() -> tuple[Exchange, bool]:
    """The fastest exchange there is, and whether it is the compiled one: that it polls, and sums."""
    if importlib.util.find_spec("numba") is None:
        return exchange, False
    from shardray.parallel.kernels import collective

    return collective.compile_exchange(), True


def _reached(counters: int, step: int, first: int, end: int) -> bool:
    return all(_counter(counters, rank).value >= step for rank in range(first, end))


def _counter(counters: int, rank: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(counters + rank * LINE_BYTES)
