"""Waiting for other processes of one machine: memory that they share, and polls that notice when one of them is gone.

The memory is a memfd of one rank, opened by the others through /proc: it has no name and goes with the processes.
"""

from __future__ import annotations

import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost
from shardray.parallel.place import Member
from shardray.parallel.rendezvous import Meeting

_YIELDS = 2000  # polls that give up the core before polls that sleep
_NAP_S = 50e-6
_EAGER_S = 20e-3
_LIVENESS_INTERVAL_S = 0.05


def poll_device(ready: Callable[[], bool], check: Callable[[], None], timeout_s: float) -> None:
    """Poll until ``ready``: at every turn of the scheduler for a few milliseconds, as long as a decode step takes, then
    between naps. ``check`` is called now and then and may raise. Raises TimeoutError."""
    begin = check_at = time.monotonic()
    while not ready():
        now = time.monotonic()
        time.sleep(0 if now - begin < _EAGER_S else _NAP_S)  # other threads of the process run meanwhile
        if now >= check_at:
            check()
            check_at = now + _LIVENESS_INTERVAL_S
        if now - begin > timeout_s:
            raise TimeoutError


class Waiter:
    """Polls until a condition holds: spins, then yields, then naps; watches deadline, abort and the members' lives.

    Ranks are those of the group, in the order of ``members``. Raises PeerLost for a member whose process has ended.
    """

    def __init__(self, members: Sequence[Member], timeout_s: float, aborted: threading.Event, spins: int) -> None:
        self.aborted = aborted
        self._members = members
        self._timeout_s = timeout_s
        self._spins = spins
        self._pidfds: dict[int, int] = {}
        for index, member in enumerate(members):
            if member.pid is not None and member.pid != os.getpid():
                self._pidfds[index] = self._open_pidfd(member, member.pid)

    def wait(self, ready: Callable[[], bool], operation: str, missing: Callable[[], tuple[int, ...]]) -> None:
        """Return once ``ready``. Raises CollectiveTimeout, PeerLost or MeshAborted, naming who of ``missing`` it is."""
        for _ in range(self._spins):
            if ready():
                return
        for _ in range(_YIELDS):
            if ready():
                return
            time.sleep(0)
        self.wait_long(ready, operation, missing)

    def wait_long(self, ready: Callable[[], bool], operation: str, missing: Callable[[], tuple[int, ...]]) -> None:
        """As ``wait``, for who has polled already: naps from the start."""
        start = check_at = time.monotonic()
        while not ready():
            time.sleep(_NAP_S)
            now = time.monotonic()
            if now < check_at:
                continue
            check_at = now + _LIVENESS_INTERVAL_S
            self._check(operation, missing())
            if now - start > self._timeout_s and (absent := missing()):
                raise CollectiveTimeout(operation, self._timeout_s, [self._members[index] for index in absent])

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()

    def _check(self, operation: str, missing: tuple[int, ...]) -> None:
        if self.aborted.is_set():
            raise MeshAborted(f"{operation}: aborted")
        ended = [self._members[index] for index in missing if self._has_ended(index)]
        if ended:
            raise PeerLost(operation, "its process has ended", ended)

    def _has_ended(self, index: int) -> bool:
        if index not in self._pidfds:
            return False
        poll = select.poll()  # select() ends at descriptor 1023
        poll.register(self._pidfds[index], select.POLLIN)
        return bool(poll.poll(0))

    def _open_pidfd(self, member: Member, pid: int) -> int:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            self.close()
            raise PeerLost("forming", "its process has ended", [member]) from None


def share_memory(meeting: Meeting, key: str, rank: int, owner: int, others: Sequence[int], num_bytes: int) -> mmap.mmap:
    """Memory of ``owner`` that it and ``others``, ranks of one machine, share; zeros at first. Raises MeshError."""
    if rank != owner:
        return _attach(meeting, key, owner, num_bytes)
    fd = os.memfd_create(f"shardray-{key}")
    try:
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        meeting.tell(key, f"/proc/{os.getpid()}/fd/{fd}")
        meeting.ask(f"{key}/attached", others)
        return memory
    finally:
        os.close(fd)


def _attach(meeting: Meeting, key: str, owner: int, num_bytes: int) -> mmap.mmap:
    (path,) = meeting.ask(key, [owner])
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        cause = f"its shared memory cannot be opened: {error}"
        raise PeerLost(f"forming ({key})", cause, [meeting.members[owner]]) from error
    try:
        memory = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    meeting.tell(f"{key}/attached", "")
    return memory
