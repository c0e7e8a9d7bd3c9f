"""Collectives through shared memory, for ranks on the CPUs of one machine.

    segment   | counters: one int64 per rank | 2 buffers x size slots of capacity bytes |

Operation k uses buffer k mod 2. A rank writes its slot, then sets its counter to k; whoever needs the slot polls the
counter. A counter of k also says that the rank has finished reading operation k - 1. So operation k begins when every
counter has reached k - 1: then nobody reads operation k - 2 any more, whose buffer it overwrites. It follows that no
rank is ever more than one operation ahead of another, whatever the mix of operations.

Relies on the total store order of x86-64; ``usable`` says where that holds.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from shardray.parallel.comm import sum_in_rank_order
from shardray.parallel.waiting import Waiter

_LINE = 64  # bytes between counters, so that they share no cache line
_WORDS = _LINE // 8


def usable() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


class ShmComm:
    """A group of ranks on one machine (see parallel/comm.py for the operations). Its memory goes with its last user."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, capacity_bytes: int, waiter: Waiter, name: str) -> None:
        self.rank = rank
        self.size = size
        self._name = name
        self._waiter = waiter
        self._counters = memoryview(memory)[: size * _LINE].cast("q")
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=size * _LINE)
        self._slots = data.view(2, size, capacity_bytes)
        self._capacity = capacity_bytes
        self._step = 0
        self._everyone = tuple(range(size))

    @staticmethod
    def num_bytes(size: int, capacity_bytes: int) -> int:
        return size * _LINE + 2 * size * capacity_bytes

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        for piece in self._pieces(flat):
            self._all_reduce_piece(piece)
        return flat.view(x.shape)

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        rows, row_bytes = x.shape[0], max(widths) * x.element_size()
        out = x.new_empty(rows, sum(widths)) if self.rank == 0 else None
        if row_bytes == 0:
            return out
        if row_bytes > self._capacity:
            raise ValueError(f"{self._name} gather: a row of {row_bytes} bytes exceeds the slot of {self._capacity}")
        chunk = self._capacity // row_bytes
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            self._gather_rows(x[part], widths, None if out is None else out[part])
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        for piece in self._pieces(flat):
            self._broadcast_piece(piece)
        return x if self.rank == 0 or x.is_contiguous() else x.copy_(flat.view(x.shape))

    def abort(self) -> None:
        self._waiter.aborted.set()

    def close(self) -> None:
        self._waiter.close()
        del self._counters, self._slots

    def _pieces(self, flat: Tensor) -> Sequence[Tensor]:
        """What fits a slot, one after the other; nothing of an empty tensor."""
        chunk = self._capacity // flat.element_size()
        if 0 < flat.numel() <= chunk:
            return (flat,)
        return [flat[start : start + chunk] for start in range(0, flat.numel(), chunk)]

    def _all_reduce_piece(self, x: Tensor) -> None:
        buffer = self._begin("all_reduce")[:, : x.numel() * x.element_size()].view(x.dtype)
        buffer[self.rank].copy_(x)
        self._arrive()
        self._wait_for("all_reduce", self._step, self._everyone)
        sum_in_rank_order(buffer.unbind(), x)

    def _broadcast_piece(self, x: Tensor) -> None:
        slot = self._begin("broadcast")[0, : x.numel() * x.element_size()].view(x.dtype)
        if self.rank == 0:
            slot.copy_(x)
            self._arrive()
        else:
            self._arrive()
            self._wait_for("broadcast", self._step, (0,))
            x.copy_(slot)

    def _gather_rows(self, x: Tensor, widths: Sequence[int], out: Tensor | None) -> None:
        buffer = self._begin("gather")
        if out is None:
            if x.numel():
                buffer[self.rank, : x.numel() * x.element_size()].view(x.dtype).view(x.shape).copy_(x)
            self._arrive()
            return
        self._arrive()
        self._wait_for("gather", self._step, self._everyone)
        column = widths[0]
        out[:, :column] = x
        for rank in range(1, self.size):
            num_bytes, width = x.shape[0] * widths[rank] * x.element_size(), widths[rank]
            out[:, column : column + width] = buffer[rank, :num_bytes].view(x.dtype).view(x.shape[0], width)
            column += width

    def _begin(self, operation: str) -> Tensor:
        """Start the next operation: its buffer (size, capacity), once nobody reads what it held."""
        self._step += 1
        self._wait_for(operation, self._step - 1, self._everyone)
        return self._slots[self._step & 1]

    def _arrive(self) -> None:
        self._counters[self.rank * _WORDS] = self._step

    def _wait_for(self, operation: str, step: int, ranks: Sequence[int]) -> None:
        counters = self._counters

        def missing() -> tuple[int, ...]:
            return tuple(rank for rank in ranks if counters[rank * _WORDS] < step)

        def ready() -> bool:
            return all(counters[rank * _WORDS] >= step for rank in ranks)

        self._waiter.wait(ready, f"{self._name} {operation}", missing)
