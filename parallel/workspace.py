"""Memory for what a stack of layers computes and uses up: the same from layer to layer and from step to step.

Fresh memory costs a page fault for every 4 KiB, which for a prompt of a few thousand tokens is as much as the small
operations on it. And what was used a layer ago is still in the caches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_active = threading.local()


class Workspace:
    """Tensors are handed out in turns; those of the turn before last are overwritten. For one thread at a time."""

    def __init__(self) -> None:
        self._turns: list[list[Tensor]] = [[], []]
        self._turn = self._next = 0

    def new_turn(self) -> None:
        """Tensors made in the turn before the last are used up."""
        self._turn, self._next = 1 - self._turn, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """What this thread asks ``empty`` for comes from here meanwhile."""
        before = getattr(_active, "workspace", None)
        _active.workspace = self
        try:
            yield
        finally:
            _active.workspace = before

    def take(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8; a program that was recorded with a smaller buffer keeps that one."""
        buffers, index = self._turns[self._turn], self._next
        self._next += 1
        if index == len(buffers):
            buffers.append(torch.empty(0, dtype=torch.uint8))
        if buffers[index].numel() < num_bytes:
            buffers[index] = torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8)
        return buffers[index][:num_bytes]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU, from the workspace that is active, if one is."""
    workspace: Workspace | None = getattr(_active, "workspace", None)
    if workspace is None:
        return torch.empty(shape, dtype=dtype)
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return workspace.take(num_bytes).view(dtype).view(shape)
