"""Fills tensors from a checkpoint: on a CPU by reading straight into them, on a GPU through a few pinned buffers.

For a GPU, threads copy pieces out of the page cache into pinned memory, from where a stream of its own brings them to
their places, while the threads are at the next pieces. No whole tensor lies on the host.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint

_NUM_THREADS = 6  # each copies two to three GB/s
_BUFFER_BYTES = 16 << 20


class Filling(Protocol):
    device: torch.device

    def fill(self, target: Tensor, checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> None:
        """Begin to fill ``target``, of any strides and dtype, with ``index`` of a stored tensor.

        Raises CheckpointError, or ``finish`` does.
        """

    def finish(self) -> None:
        """Return once all is in place for what the device is given next."""


class DirectFilling:
    """Of tensors on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def fill(self, target: Tensor, checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> None:
        info = checkpoint.tensors.get(name)
        if info is not None and info.dtype == target.dtype and target.is_contiguous():
            checkpoint.read(name, index, target)
        else:
            target.copy_(checkpoint.read(name, index))

    def finish(self) -> None:
        return None


class StagedFilling:
    """Of tensors on a GPU. (On a CPU it does the same, without a stream.)"""

    def __init__(
        self, device: torch.device, num_threads: int = _NUM_THREADS, buffer_bytes: int = _BUFFER_BYTES
    ) -> None:
        self.device = device
        self._buffer_bytes = buffer_bytes
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(num_threads + 2):  # two on their way to the device
            self._buffers.put(_Buffer(buffer_bytes, self._stream))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="filling")
        self._pieces: list[Future[None]] = []

    def fill(self, target: Tensor, checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> None:
        if self._stream is not None:  # the target's memory may have been in use until just now
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        row_bytes = math.prod(target.shape[1:]) * checkpoint.tensors[name].item_bytes
        num_rows = max(1, self._buffer_bytes // max(1, row_bytes))
        start = (index[0].start or 0) if index else 0
        for first in range(0, len(target), num_rows):
            part = target[first : first + num_rows]
            rows = slice(start + first, start + first + len(part))
            self._pieces.append(self._threads.submit(self._bring, part, checkpoint, name, (rows, *index[1:])))

    def finish(self) -> None:
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            piece.result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _bring(self, target: Tensor, checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> None:
        buffer = self._buffers.get()
        try:
            memory = buffer.take(target.numel() * checkpoint.tensors[name].item_bytes)
            buffer.send(checkpoint.read(name, index, memory), target)
        finally:
            self._buffers.put(buffer)


class _Buffer:
    """Pinned memory, and what was last sent from it."""

    def __init__(self, num_bytes: int, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._memory = self._allocate(num_bytes)
        self._sent = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, num_bytes: int) -> Tensor:
        """The memory, of at least that size, once nothing is under way from it any more."""
        if self._sent is not None:
            self._sent.synchronize()
        if num_bytes > self._memory.numel():
            self._memory = self._allocate(num_bytes)
        return self._memory

    def send(self, staged: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            if staged.dtype != target.dtype or not target.is_contiguous():
                staged = staged.to(target.device, non_blocking=True)  # the device converts and transposes faster
            target.copy_(staged, non_blocking=True)
            if self._sent is not None:
                self._sent.record()

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)


@contextlib.contextmanager
def open_filling(device: torch.device) -> Iterator[Filling]:
    """The way to fill tensors of a device; afterwards its buffers are given back."""
    if device.type == "cpu":
        yield DirectFilling(device)
        return
    filling = StagedFilling(device)
    try:
        yield filling
        torch.cuda.synchronize(device)
    finally:
        filling.close()
        torch.cuda.empty_cache()  # what conversions took is to be counted as free
