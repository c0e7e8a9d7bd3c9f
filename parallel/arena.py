"""Memory of this process for tensors that are kept for long, in huge pages where the system has them."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from shardray.parallel import huge_pages

_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64  # of each tensor, as torch's own


class _Arena:
    """Tensors one after the other, in chunks: each of its own would begin and end in the middle of a huge page.

    A chunk is given back with the last of its tensors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._end = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(*shape, dtype=dtype)
        if num_bytes >= _CHUNK_BYTES:
            return _map(num_bytes).view(dtype).view(*shape)
        with self._lock:
            if self._end + num_bytes > len(self._chunk):
                self._chunk, self._end = _map(_CHUNK_BYTES), 0
            place = self._chunk[self._end : self._end + num_bytes]
            self._end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return place.view(dtype).view(*shape)


def _map(num_bytes: int) -> Tensor:
    """Bytes that are 0, and taken from the system when they are touched."""
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system refuses {num_bytes:,} bytes: {error.strerror}") from None
    huge_pages.advise(memory)
    return torch.frombuffer(memory, dtype=torch.uint8)


_arena = _Arena()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU that is to be kept for long. Raises MemoryError."""
    return _arena.empty(shape, dtype)
