"""Where the ranks of a mesh meet while it forms: what one of them tells, the others can wait for.

Every wait has a deadline, and its error names the ranks that have not come.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, MeshError, PeerLost
from shardray.parallel.place import MeshSpec

_FIRST_POLL_S = 0.0005
_LONGEST_POLL_S = 0.05
_ABORTED = "aborted"  # a key beside those of the epoch


class Rendezvous:
    """The store through which the ranks of a mesh find each other; kept by the leader's process."""

    def __init__(self, bind_host: str) -> None:
        listener = socket.create_server((bind_host, 0))
        self.host = bind_host
        self.port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            bind_host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def abort(self) -> None:
        """Make every rank that waits for another one here raise MeshAborted soon. Thread-safe."""
        self._store.set(_ABORTED, "")


class Meeting:
    """One rank's side of the rendezvous, under the name of the mesh's epoch."""

    def __init__(self, spec: MeshSpec) -> None:
        self._spec = spec
        root = _connect(spec)
        self._root: dist.Store | None = root
        self._store: dist.Store | None = dist.PrefixStore(spec.epoch, root)
        self.members = [spec.member(rank) for rank in range(spec.size)]

    def introduce(self) -> None:
        """Wait until every rank of the mesh is here; ``members`` then knows their processes."""
        self.tell("member", f"{os.getpid()} {self._spec.bind_host}")
        for rank, answer in enumerate(self.ask("member", range(self._spec.size))):
            pid, host = answer.split(" ", 1)
            self.members[rank] = self._spec.member(rank, int(pid), host)

    def tell(self, key: str, value: str) -> None:
        """Leave a value for whoever asks this rank for ``key``; once per key."""
        store = self._open_store()
        try:
            store.set(f"{key}/{self._spec.rank}", value)
        except dist.DistError as error:
            raise self._lost_leader(key) from error

    def ask(
        self,
        key: str,
        ranks: Sequence[int],
        check: Callable[[], None] = lambda: None,
        timeout_s: float | None = None,
    ) -> list[str]:
        """What each of ``ranks`` tells for ``key``. ``check`` runs between polls and may raise.

        Raises CollectiveTimeout naming the ranks that told nothing within ``timeout_s`` (default: of the forming).
        """
        store, timeout_s = self._open_store(), timeout_s or self._spec.form_timeout_s
        deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
        try:
            while absent := _absent(store, key, ranks):
                try:
                    check()
                    self._check_abort(key)
                except MeshError:
                    if _absent(store, key, ranks):
                        raise
                    break  # the last one told and was gone
                if time.monotonic() > deadline:
                    raise CollectiveTimeout(f"forming ({key})", timeout_s, [self.members[rank] for rank in absent])
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, _LONGEST_POLL_S)
            return [store.get(f"{key}/{rank}").decode() for rank in ranks]
        except dist.DistError as error:
            raise self._lost_leader(key) from error

    def store(self, name: str) -> dist.Store:
        """A store of its own for a process group."""
        return dist.PrefixStore(name, self._open_store())

    def close(self) -> None:
        self._store = self._root = None

    def _check_abort(self, key: str) -> None:
        if self._root is not None and self._root.check([_ABORTED]):
            raise MeshAborted(f"forming ({key}): aborted")

    def _open_store(self) -> dist.Store:
        if self._store is None:
            raise RuntimeError("the mesh was closed")
        return self._store

    def _lost_leader(self, key: str) -> PeerLost:
        return PeerLost(f"forming ({key})", "its rendezvous is gone", self.members[:1])


def _absent(store: dist.Store, key: str, ranks: Sequence[int]) -> list[int]:
    return [rank for rank in ranks if not store.check([f"{key}/{rank}"])]


def _connect(spec: MeshSpec) -> dist.Store:
    if spec.size == 1:
        return dist.HashStore()
    timeout = datetime.timedelta(seconds=spec.form_timeout_s)
    try:
        return dist.TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        where = f"reaching the leader's rendezvous at {spec.store_host}:{spec.store_port}"
        raise CollectiveTimeout(where, spec.form_timeout_s, [spec.member(0)]) from error
