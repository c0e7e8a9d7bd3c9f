"""Collectives through shared memory, for ranks on the CPUs of one machine: exchanges (see parallel/exchange.py)."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from shardray.parallel.comm import sum_in_rank_order
from shardray.parallel.exchange import (
    ALL_SLOTS,
    BEGUN,
    LINE_BYTES,
    NOTHING,
    SUM_BFLOAT16,
    SUM_FLOAT32,
    block,
    choose_exchange,
)
from shardray.parallel.waiting import Waiter

_COMPILED_SUMS = {torch.float32: SUM_FLOAT32, torch.bfloat16: SUM_BFLOAT16}
# A compiled wait: microseconds of polls that keep the core, then about a millisecond of polls that offer it to others.
_NUM_SPINS, _NUM_CYCLES = 100, 3_000_000


def usable() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


class ShmComm:
    """A group of ranks on one machine (see parallel/comm.py for the operations). Its memory goes with its last user."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, capacity_bytes: int, waiter: Waiter, name: str) -> None:
        self.rank = rank
        self.size = size
        self._name = name
        self._waiter = waiter
        self._segment = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = self._segment[size * LINE_BYTES :].view(2, size, capacity_bytes)
        self._counters = memoryview(memory)[: size * LINE_BYTES].cast("q")[:: LINE_BYTES // 8]
        self._capacity = capacity_bytes
        self._exchange, compiled = choose_exchange()
        self._is_compiled = compiled
        self._sums = _COMPILED_SUMS if compiled else {}
        self._wait = waiter.wait_long if compiled else waiter.wait
        self._finished = ctypes.c_int64(0)  # operations

    @staticmethod
    def num_bytes(size: int, capacity_bytes: int) -> int:
        return size * LINE_BYTES + 2 * size * capacity_bytes

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        outcome = self._sums.get(x.dtype, NOTHING)
        for piece in self._pieces(x):
            slots = self._run("all_reduce", piece, range(self.size), outcome, piece)
            if outcome == NOTHING:
                sum_in_rank_order(_as(piece, slots).unbind(), piece.view(-1))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if x.nbytes > self._capacity:
            raise ValueError(f"{self._name} all_gather: {x.nbytes} bytes exceed the slot of {self._capacity}")
        x, out = x.contiguous(), torch.empty((self.size, *x.shape), dtype=x.dtype)
        if x.numel():
            slots = self._run("all_gather", x, range(self.size), ALL_SLOTS if self._is_compiled else NOTHING, out)
            if not self._is_compiled:
                out.view(self.size, -1).copy_(_as(x, slots))
        return out

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
            if out is None:
                self._run("gather", x[part].contiguous(), range(0))
            else:
                slots = self._run("gather", None, range(1, self.size))
                out[part, : widths[0]] = x[part]
                self._take_columns(slots, widths, out[part])
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        flat = x.contiguous()
        for piece in self._pieces(flat):
            if self.rank == 0:
                self._run("broadcast", piece, range(0))
            else:
                slots = self._run("broadcast", None, range(1))
                piece.view(-1).copy_(_as(piece, slots)[0])
        return x if self.rank == 0 or flat is x else x.copy_(flat)

    def abort(self) -> None:
        self._waiter.aborted.set()

    def close(self) -> None:
        self._waiter.close()
        del self._counters, self._slots, self._segment

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        """What fits a slot, one after the other; nothing of an empty tensor."""
        if 0 < x.nbytes <= self._capacity:
            return (x,)
        flat, chunk = x.view(-1), self._capacity // x.element_size()
        return [flat[start : start + chunk] for start in range(0, x.numel(), chunk)]

    def _take_columns(self, slots: Tensor, widths: Sequence[int], out: Tensor) -> None:
        column = widths[0]
        for rank in range(1, self.size):
            block = out[:, column : column + widths[rank]]
            block.copy_(slots[rank, : block.nbytes].view(out.dtype).view(block.shape))
            column += widths[rank]

    def _run(
        self, operation: str, own: Tensor | None, awaited: range, outcome: int = NOTHING, out: Tensor | None = None
    ) -> Tensor:
        """This rank's part of the next operation: brings ``own``, contiguous, and writes ``outcome`` to ``out``.

        Returns all slots, (size, capacity) of bytes, of which those ``awaited`` are filled; they hold until the next
        operation.
        """
        slots = self._slots  # keeps the memory, whoever closes this
        address, num_bytes = (0, 0) if own is None else (own.data_ptr(), own.nbytes)
        numbers = block(
            ctypes.addressof(self._finished), self._segment.data_ptr(), self.rank, self.size, awaited.start,
            awaited.stop, _NUM_SPINS, _NUM_CYCLES, slots.data_ptr(), self._capacity, address, num_bytes, outcome,
            0 if out is None else out.data_ptr(),
        )  # fmt: skip
        self._exchange(numbers, lambda progress: self._wait_for(operation, progress, awaited))
        return slots[self._finished.value & 1]

    def _wait_for(self, operation: str, progress: int, awaited: range) -> None:
        counters, step, ranks = self._counters, self._finished.value + 1, awaited
        if progress == BEGUN:
            step, ranks = step - 1, range(self.size)

        def missing() -> tuple[int, ...]:
            return tuple(rank for rank in ranks if counters[rank] < step)

        self._wait(lambda: not missing(), f"{self._name} {operation}", missing)


def _as(piece: Tensor, slots: Tensor) -> Tensor:
    """The slots (size, elements) as elements of ``piece``'s dtype and number."""
    return slots[:, : piece.nbytes].view(piece.dtype)
