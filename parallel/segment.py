"""Memory that the first process of a machine to need it fills, and that others of the same user map as it is.

It is a memfd, like the memory of collectives (see waiting.py): no file, no limit of /dev/shm, gone with the last
process that maps it, however that ends. Others find it in /proc, by its name, which says what it holds:

    sealed, so whole for good          map it
    none, and the lock can be had      make it: fill it, seal it
    none, and the lock is taken        wait while the one who makes it gets on; the lock goes with its process

The lock is an abstract socket's name: the kernel gives it to one process and takes it back when that ends. Nothing is
left behind by anyone, and half-filled memory is never used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import math
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shardray.parallel import arena, huge_pages

_log = logging.getLogger(__name__)
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since 5.1: no new mapping may write
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # asm-generic/mman-common.h, since 5.14
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_ALIGNMENT = 64  # of each tensor, as torch's own
_HUGE_BYTES = 2 << 20  # of a huge page
_POLL_S = 0.1
_PATIENCE_S = 60.0  # with one who makes the memory and does not get on

Fill = Callable[[Tensor], None]


class Segment:
    """Tensors one after the other, in the order in which they are asked for: the same for all who name it alike.

    Its memory lives as long as one of its tensors, in any process.
    """

    def __init__(self, fd: int, capacity: int, is_filled: bool) -> None:
        """``capacity``: bytes that it can grow to, or has if ``is_filled``. Raises OSError."""
        self.is_filled = is_filled
        # The mapping has a descriptor of its own, by which others find the memory for as long as it is in use here.
        self._memory = mmap.mmap(fd, capacity, flags=mmap.MAP_PRIVATE if is_filled else mmap.MAP_SHARED)
        huge_pages.advise(self._memory)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._end = 0
        self._room = 0  # bytes that there are, if it is to be filled
        self._is_spoilt = False
        if is_filled:
            self._forbid_writes()
            with contextlib.suppress(OSError):  # an older kernel does it page by page, in the first steps
                self._memory.madvise(_MADV_POPULATE_READ)
        self._fd = os.dup(fd)

    @classmethod
    def create(cls, name: str, capacity: int) -> Segment:
        """An empty one. Raises OSError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, capacity)  # or it could not be mapped
            segment = cls(fd, capacity, False)
            os.ftruncate(fd, 0)  # it grows with what is in it, which those who wait can see
            return segment
        finally:
            os.close(fd)

    @property
    def num_borrowed_bytes(self) -> int:
        """What others filled of what this process maps."""
        return len(self._memory) if self.is_filled else 0

    def place(self, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> Tensor:
        """The next tensor, filled by ``fill`` unless it is there already. Without room it is this process's own."""
        num_bytes = math.prod(shape) * dtype.itemsize
        start, end = self._end, self._end + num_bytes
        if num_bytes == 0 or not self._reaches(end):
            return own_tensor(shape, dtype, fill)
        self._end = -(-end // _ALIGNMENT) * _ALIGNMENT
        tensor = self._bytes[start:end].view(dtype).view(*shape)
        if not self.is_filled:
            fill(tensor)
        return tensor

    def spoil(self, reason: str) -> None:
        """Keep it from others."""
        if not self._is_spoilt:
            _log.info("weights are not shared with other processes: %s", reason)
        self._is_spoilt = True

    def close(self) -> None:
        """No tensor follows. Others may use what there is, if it is whole and they may."""
        try:
            if not self.is_filled and not self._is_spoilt and self._end > 0:
                self._forbid_writes()
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            self.spoil(f"this system cannot seal memory ({error})")
        finally:
            os.close(self._fd)

    def _reaches(self, end: int) -> bool:
        """Whether there is memory up to ``end``; it is taken, so that writing to it cannot fail."""
        if self.is_filled:
            if end > len(self._memory):  # the name does not say all that it should
                raise RuntimeError(f"shared weights end after {len(self._memory)} bytes, {end} are needed")
        elif not self._is_spoilt:
            try:
                if end > self._room:
                    self._grow(end)
            except OSError as error:
                self.spoil(f"no room after {self._end} bytes ({error})")
        return not self._is_spoilt

    def _grow(self, room: int) -> None:
        """Raises OSError."""
        comes_huge = huge_pages.can_be_shared()
        if comes_huge:
            room = -(-room // _HUGE_BYTES) * _HUGE_BYTES
        if room > len(self._memory):
            raise OSError(errno.ENOSPC, "more than was reckoned with")
        if comes_huge:  # what is taken by way of the descriptor comes in small pages
            os.ftruncate(self._fd, room)
            self._memory.madvise(_MADV_POPULATE_WRITE, self._room, room - self._room)
        else:
            os.posix_fallocate(self._fd, self._room, room - self._room)
        self._room = room

    def _forbid_writes(self) -> None:
        """A stray write is to end here rather than in the results of others. Raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._bytes.data_ptr()), ctypes.c_size_t(len(self._memory)), mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")


def own_tensor(shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> Tensor:
    """One of this process alone."""
    tensor = arena.empty(shape, dtype)
    fill(tensor)
    return tensor


@contextlib.contextmanager
def open_segment(
    name: str, capacity: int, waiting: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[Segment | None]:
    """The memory of that name on this machine: whole, or to be filled meanwhile, up to ``capacity`` bytes.

    ``waiting``: called with the number of bytes that are there, while another process fills it. None where memory
    cannot be shared, or whoever fills it does not get on: everyone then has weights of his own.
    """
    with contextlib.ExitStack() as held:
        segment: Segment | None = None
        try:
            segment = _find_or_create(name, capacity, waiting, held)
        except OSError as error:
            _log.info("weights are not shared with other processes: %s", error)
        try:
            yield segment
        except BaseException:
            if segment is not None:
                segment.spoil("loading failed")
            raise
        finally:
            if segment is not None:
                segment.close()


def _find_or_create(
    name: str, capacity: int, waiting: Callable[[int], None], held: contextlib.ExitStack
) -> Segment | None:
    """``held`` is given the lock if there is something to fill. Raises OSError."""
    with contextlib.ExitStack() as own:
        lock = _wait_for_lock(name, waiting)
        if lock is None:
            _log.info("weights are not shared with other processes: whoever loads them does not get on")
            return None
        own.enter_context(lock)
        if (found := _open_sealed(name)) is not None:
            return found
        segment = Segment.create(name, capacity)
        held.push(own.pop_all())
        return segment


def _wait_for_lock(name: str, waiting: Callable[[int], None]) -> socket.socket | None:
    """What nobody else has while it is open; None if whoever has it does not get on. Raises OSError."""
    most, since = -1, time.monotonic()
    while (lock := _lock(name)) is None:
        num_bytes = _size(name)
        waiting(num_bytes)
        if num_bytes > most:
            most, since = num_bytes, time.monotonic()
        elif time.monotonic() - since > _PATIENCE_S:
            return None
        time.sleep(_POLL_S)
    return lock


def _size(name: str) -> int:
    """Bytes that there are so far."""
    for path in _find(name):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


def _lock(name: str) -> socket.socket | None:
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{name}-{os.geteuid()}")
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return lock


def _open_sealed(name: str) -> Segment | None:
    for path in _find(name):
        with contextlib.suppress(OSError):  # its process may just have ended
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                is_ours = os.fstat(fd).st_uid == os.geteuid()
                if is_ours and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS:
                    return Segment(fd, os.fstat(fd).st_size, True)
            finally:
                os.close(fd)
    return None


def _find(name: str) -> Iterator[Path]:
    """The descriptors of processes, those of other users mostly left out, that refer to a memfd of that name."""
    target = f"/memfd:{name} (deleted)"
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # not ours to look at, or gone
            for descriptor in os.listdir(folder):
                path = folder / descriptor
                with contextlib.suppress(OSError):
                    if os.readlink(path) == target:
                        yield path
