"""Hand-off of hidden states between neighbouring pipeline stages, rank by rank.

The shape follows from the step plan that every rank has, so nothing but the activations travels. On one machine the
receiver works in the sender's shared memory; between machines or GPUs the send runs beside the next step.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from shardray.parallel.comm import PairComm
from shardray.parallel.waiting import Waiter

_HEADER_BYTES = 128  # two counters, a cache line each
_WRITTEN, _READ = 0, 8  # their places, in int64
_NUM_SLOTS = 2
_SENDER, _RECEIVER = 0, 1  # ranks of the pipe's group


class StagePipe(Protocol):
    """One direction between two stages. Both ends count steps alike; each operation has a deadline (MeshError)."""

    def send(self, hidden: Tensor) -> None:
        """Hand (num_tokens, hidden_size) to the next stage; waits while the receiver is too far behind."""

    def recv(self, num_tokens: int) -> Tensor:
        """(num_tokens, hidden_size) of the stage before, valid until the next ``recv``."""

    def abort(self) -> None:
        """Make a blocked operation raise MeshAborted soon. Thread-safe."""

    def close(self) -> None: ...


class ShmPipe:
    """A ring of two slots in shared memory: one producer, one consumer. Its memory goes with its last user.

    The receiver holds one slot while it computes, the sender fills the other; then the sender waits.
    """

    def __init__(
        self, memory: mmap.mmap, max_tokens: int, hidden_size: int, dtype: torch.dtype, waiter: Waiter, name: str
    ) -> None:
        self._counters = memoryview(memory)[:_HEADER_BYTES].cast("q")
        count = _NUM_SLOTS * max_tokens * hidden_size
        data = torch.frombuffer(memory, dtype=dtype, offset=_HEADER_BYTES, count=count)
        self._slots = data.view(_NUM_SLOTS, max_tokens, hidden_size)
        self._waiter = waiter
        self._name = name
        self._step = 0  # hand-offs done on this side

    @staticmethod
    def num_bytes(max_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
        return _HEADER_BYTES + _NUM_SLOTS * max_tokens * hidden_size * dtype.itemsize

    def send(self, hidden: Tensor) -> None:
        counters, needed = self._counters, self._step - _NUM_SLOTS + 1
        self._waiter.wait(lambda: counters[_READ] >= needed, f"{self._name} send", lambda: (_RECEIVER,))
        self._slots[self._step % _NUM_SLOTS, : hidden.shape[0]].copy_(hidden)
        self._step += 1
        counters[_WRITTEN] = self._step

    def recv(self, num_tokens: int) -> Tensor:
        counters, step = self._counters, self._step
        counters[_READ] = step  # what the last call returned is free now
        self._waiter.wait(lambda: counters[_WRITTEN] > step, f"{self._name} receive", lambda: (_SENDER,))
        self._step += 1
        return self._slots[step % _NUM_SLOTS, :num_tokens]

    def abort(self) -> None:
        self._waiter.aborted.set()

    def close(self) -> None:
        self._waiter.close()
        del self._counters, self._slots


class MessagePipe:
    """Messages of a group of two (gloo or NCCL). One is under way while the sender computes the next."""

    def __init__(
        self, comm: PairComm, max_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._comm = comm
        self._inbox = torch.empty(max_tokens, hidden_size, dtype=dtype, device=device)
        self._sending: Any = None

    def send(self, hidden: Tensor) -> None:
        if self._sending is not None:
            self._comm.finish_send(self._sending)
        self._sending = self._comm.start_send(hidden)

    def recv(self, num_tokens: int) -> Tensor:
        return self._comm.recv(self._inbox[:num_tokens])

    def abort(self) -> None:
        self._comm.abort()

    def close(self) -> None:
        self._sending = None
        self._comm.close()
