"""Memory for what a stack of layers computes and uses up: the same from layer to layer and from step to step.

Fresh memory costs a page fault for every 4 KiB, which for a prompt of a few thousand tokens is as much as the small
operations on it. And what was used a layer ago is still in the caches.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_active = threading.local()


class _Buffer:
    """Memory, and the tensor that it was last handed out as: layers ask for the same ones again and again."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._last: Tensor | None = None

    def shaped(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        last = self._last
        if last is None or last.dtype != dtype or last.shape != tuple(shape):
            num_bytes = math.prod(shape) * dtype.itemsize
            if self._bytes.numel() < num_bytes:
                self._bytes = torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8)
            last = self._last = self._bytes[:num_bytes].view(dtype).view(shape)
        return last

    def forget(self) -> None:
        self._last = None


class Workspace:
    """Tensors are handed out in turns; those of the turn before last are overwritten. For one thread at a time."""

    def __init__(self) -> None:
        self._turns: list[list[_Buffer]] = [[], []]
        self._turn = self._next = 0

    def new_turn(self) -> None:
        """Tensors made in the turn before the last are used up."""
        self._turn, self._next = 1 - self._turn, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """What this thread asks ``empty`` for comes from here meanwhile."""
        before = getattr(_active, "workspace", None)
        for buffer in itertools.chain(*self._turns):
            buffer.forget()  # who records what is done meanwhile keeps the memory of the tensors that it sees made
        _active.workspace = self
        try:
            yield
        finally:
            _active.workspace = before

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor of this turn; a program that was recorded with a smaller buffer keeps that one."""
        buffers, index = self._turns[self._turn], self._next
        self._next += 1
        if index == len(buffers):
            buffers.append(_Buffer())
        return buffers[index].shaped(shape, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU, from the workspace that is active, if one is."""
    workspace: Workspace | None = getattr(_active, "workspace", None)
    return torch.empty(shape, dtype=dtype) if workspace is None else workspace.take(shape, dtype)
