"""Collectives and hand-offs through shared memory, for ranks on the CPUs of one machine.

    segment   | counters: one int64 per rank | 2 buffers x size slots of capacity bytes |

Operation k uses buffer k mod 2. A rank writes its slot, then its counter; whoever needs the slot polls the counter. A
counter of k says that the rank has finished reading operation k - 1, so a buffer may be overwritten once every counter
has reached the operation before. Relies on the total store order of x86-64; ``usable`` says where that holds.

The memory is a memfd of one rank, opened by the others through /proc: it has no name and goes with the processes.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost

_LINE = 64  # bytes between counters, so that they share no cache line
_YIELDS = 2000  # polls that give up the core before polls that sleep
_NAP_S = 50e-6
_LIVENESS_INTERVAL_S = 0.05


def usable() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


class Waiter:
    """Polls until a condition holds: spins, then yields, then naps; watches deadline, abort and the peers' lives."""

    def __init__(self, pids: Sequence[int], timeout_s: float, abort: threading.Event, spins: int) -> None:
        self._pidfds = {rank: os.pidfd_open(pid) for rank, pid in enumerate(pids) if pid != os.getpid()}
        self._timeout_s = timeout_s
        self._abort = abort
        self._spins = spins

    def wait(self, ready: Callable[[], bool], operation: str, missing: Callable[[], tuple[int, ...]]) -> None:
        for _ in range(self._spins):
            if ready():
                return
        for _ in range(_YIELDS):
            if ready():
                return
            time.sleep(0)
        self._wait_long(ready, operation, missing)

    def _wait_long(self, ready: Callable[[], bool], operation: str, missing: Callable[[], tuple[int, ...]]) -> None:
        start = check_at = time.monotonic()
        while not ready():
            time.sleep(_NAP_S)
            now = time.monotonic()
            if now < check_at:
                continue
            check_at = now + _LIVENESS_INTERVAL_S
            self._check_alive(operation, missing())
            if now - start > self._timeout_s:
                raise CollectiveTimeout(operation, self._timeout_s, missing())

    def _check_alive(self, operation: str, missing: tuple[int, ...]) -> None:
        if self._abort.is_set():
            raise MeshAborted(f"{operation}: aborted")
        for rank in missing:
            pidfd = self._pidfds.get(rank)
            if pidfd is not None and select.select([pidfd], [], [], 0)[0]:
                raise PeerLost(operation, f"the process of rank {rank} has ended", (rank,))

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()


def share_memory(store: dist.Store, key: str, is_owner: bool, num_bytes: int) -> mmap.mmap:
    """Memory that the ranks of one machine share: made by the owner, found by the others through the store."""
    if is_owner:
        fd = os.memfd_create(f"shardray-{key}")
        os.ftruncate(fd, num_bytes)
        store.set(key, f"/proc/{os.getpid()}/fd/{fd}")
    else:
        fd = os.open(store.get(key).decode(), os.O_RDWR)
    memory = mmap.mmap(fd, num_bytes)
    store.add(f"{key}/attached", 1)
    if is_owner:
        return memory  # the descriptor stays open until every rank has attached: see release_descriptor
    os.close(fd)
    return memory


class ShmComm:
    """A group of ranks on one machine (see parallel/comm.py for the operations)."""

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, capacity_bytes: int, waiter: Waiter, name: str
    ) -> None:
        self.rank = rank
        self.size = size
        self._name = name
        self._waiter = waiter
        self._memory = memory
        self._counters = memoryview(memory)[: size * _LINE].cast("q")
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=size * _LINE)
        self._slots = data.view(2, size, capacity_bytes)
        self._capacity = capacity_bytes
        self._step = 0

    @staticmethod
    def num_bytes(size: int, capacity_bytes: int) -> int:
        return size * _LINE + 2 * size * capacity_bytes

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.view(-1)
        chunk = self._capacity // x.element_size()
        for start in range(0, flat.numel(), chunk):
            self._all_reduce_chunk(flat[start : start + chunk])
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        rows = x.shape[0]
        chunk = max(1, self._capacity // (max(widths) * x.element_size()))
        out = x.new_empty(rows, sum(widths)) if self.rank == 0 else None
        for start in range(0, rows, chunk):
            self._gather_chunk(x[start : start + chunk], widths, None if out is None else out[start : start + chunk])
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        slot = self._begin("broadcast")[0, : x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        if self.rank == 0:
            slot.copy_(x)
            self._arrive()
        else:
            self._arrive()
            self._wait_for("broadcast", self._step, (0,))
            x.copy_(slot)
        return x

    def close(self) -> None:
        self._waiter.close()

    def _all_reduce_chunk(self, x: Tensor) -> None:
        buffer = self._begin("all_reduce")[:, : x.numel() * x.element_size()].view(x.dtype)
        buffer[self.rank].copy_(x)
        self._arrive()
        self._wait_for("all_reduce", self._step, range(self.size))
        if self.size == 2:
            torch.add(buffer[0], buffer[1], out=x)
        else:
            x.copy_(buffer.sum(dim=0, dtype=torch.float32))

    def _gather_chunk(self, x: Tensor, widths: Sequence[int], out: Tensor | None) -> None:
        buffer = self._begin("gather")
        if out is None:
            buffer[self.rank, : x.numel() * x.element_size()].view(x.dtype).view(x.shape).copy_(x)
            self._arrive()
            return
        self._arrive()
        self._wait_for("gather", self._step, range(self.size))
        column = widths[0]
        out[:, :column] = x
        for rank in range(1, self.size):
            num_bytes = x.shape[0] * widths[rank] * x.element_size()
            out[:, column : column + widths[rank]] = buffer[rank, :num_bytes].view(x.dtype).view(-1, widths[rank])
            column += widths[rank]

    def _begin(self, operation: str) -> Tensor:
        """Start the next operation: its buffer (size, capacity), once nobody reads what it held."""
        self._step += 1
        self._wait_for(operation, self._step - 1, range(self.size))
        return self._slots[self._step & 1]

    def _arrive(self) -> None:
        self._counters[self.rank * (_LINE // 8)] = self._step

    def _wait_for(self, operation: str, step: int, ranks: Sequence[int]) -> None:
        counters = self._counters
        places = [rank * (_LINE // 8) for rank in ranks]

        def ready() -> bool:
            return all(counters[place] >= step for place in places)

        def missing() -> tuple[int, ...]:
            return tuple(rank for rank in ranks if counters[rank * (_LINE // 8)] < step)

        self._waiter.wait(ready, f"{self._name} {operation} {step}", missing)
