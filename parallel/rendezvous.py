"""Where the ranks of a mesh meet while it forms: what one of them tells, the others can wait for.

The leader's process keeps a table and serves it over one connection a rank, made like a control link: with the mesh's
secret, and TLS where that is configured. It stops listening once every rank is there. Every wait has a deadline, and
its error names the ranks that have not come.

    request   (key, value)           set it
              ([key ...], seconds)   their values, as soon as all are there or the time is over
    answer    [value or null ...], or null once the mesh is aborted
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch.distributed as dist

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import CollectiveTimeout, MeshAborted, MeshError, PeerLost
from shardray.parallel.greeting import Door, connect
from shardray.parallel.link import Link
from shardray.parallel.place import Member, MeshSpec
from shardray.parallel.store import MeetingStore

_POLL_S = 0.05  # between two looks at what else may end a wait
_SEND_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)

_Values = list[bytes | None]
_Answer = _Values | None


class _Set(msgspec.Struct, frozen=True, tag=True, array_like=True):
    key: str
    value: bytes


class _Get(msgspec.Struct, frozen=True, tag=True, array_like=True):
    keys: tuple[str, ...]
    wait_s: float


class _Table:
    """What has been told so far."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._is_aborted = False
        self._changed = threading.Condition()

    def answer(self, request: _Set | _Get) -> _Answer:
        with self._changed:
            if isinstance(request, _Set):
                self._values[request.key] = request.value
                self._changed.notify_all()
                return []
            self._changed.wait_for(
                lambda: self._is_aborted or all(key in self._values for key in request.keys), request.wait_s
            )
            return None if self._is_aborted else [self._values.get(key) for key in request.keys]

    def abort(self) -> None:
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()


class Rendezvous:
    """The table through which the ``size`` ranks of a mesh find each other; kept by the leader's process."""

    def __init__(self, bind_host: str, credentials: Credentials, size: int) -> None:
        self.host = bind_host
        self._table = _Table()
        self._links: list[Link] = []
        self._door = Door(bind_host, credentials, "rendezvous")
        self.port = self._door.port
        threading.Thread(target=self._welcome, args=(size,), name="rendezvous", daemon=True).start()

    def abort(self) -> None:
        """Make every rank that waits for another one here raise MeshAborted soon. Thread-safe."""
        self._table.abort()

    def close(self) -> None:
        """End it for every rank. Idempotent."""
        self._door.close()
        for link in self._links:
            link.abort()

    def _welcome(self, size: int) -> None:
        missing = {rank: Member(rank, 0, 0) for rank in range(size)} if size > 1 else {}
        try:
            for rank, link in self._door.enter(missing, _SEND_TIMEOUT_S, math.inf):
                self._links.append(link)
                threading.Thread(target=self._serve, args=(link,), name=f"rendezvous-{rank}", daemon=True).start()
        except MeshError as error:
            _log.warning("a rank went away at the rendezvous: %s", error)
        finally:
            self._door.close()

    def _serve(self, link: Link) -> None:
        try:
            while True:
                request = msgspec.msgpack.decode(link.recv(), type=_Set | _Get)
                link.send(msgspec.msgpack.encode(self._table.answer(request)))
        except MeshError as error:
            _log.debug("a rank left the rendezvous: %s", error)
        finally:
            link.close()


class Meeting:
    """One rank's side of the rendezvous."""

    def __init__(self, spec: MeshSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()  # one question at a time
        self._link = _connect(spec) if spec.size > 1 else None
        self._own = _Table()  # in place of the leader's, in a mesh of one
        self._is_open = True
        self.members = [spec.member(rank) for rank in range(spec.size)]

    def introduce(self) -> None:
        """Wait until every rank of the mesh is here; ``members`` then knows their processes."""
        self.tell("member", f"{os.getpid()} {self._spec.bind_host}")
        for rank, answer in enumerate(self.ask("member", range(self._spec.size))):
            pid, host = answer.split(" ", 1)
            self.members[rank] = self._spec.member(rank, int(pid), host)

    def tell(self, key: str, value: str) -> None:
        """Leave a value for whoever asks this rank for ``key``; once per key."""
        self._set(f"{key}/{self._spec.rank}", value.encode())

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
        timeout_s = timeout_s or self._spec.form_timeout_s
        keys, deadline = [f"{key}/{rank}" for rank in ranks], time.monotonic() + timeout_s
        values = self._get(keys, _POLL_S)
        while None in values:
            try:
                check()
            except MeshError:
                if None in (values := self._get(keys, 0.0)):
                    raise
                break  # the last one told and was gone
            if time.monotonic() > deadline:
                absent = [self.members[rank] for rank, value in zip(ranks, values, strict=True) if value is None]
                raise CollectiveTimeout(f"forming ({key})", timeout_s, absent)
            values = self._get(keys, _POLL_S)
        return [value.decode() for value in values if value is not None]

    def store(self, name: str) -> dist.Store:
        """A store of its own for a process group. The meeting has to outlive it."""
        return MeetingStore(name, self._set, self._get, self._spec.form_timeout_s)

    def close(self) -> None:
        self._is_open = False
        if self._link is not None:
            self._link.close()

    def _set(self, key: str, value: bytes) -> None:
        self._request(_Set(key, value), key)

    def _get(self, keys: Sequence[str], wait_s: float) -> _Values:
        return self._request(_Get(tuple(keys), wait_s), keys[0])

    def _request(self, request: _Set | _Get, key: str) -> _Values:
        what = f"forming ({key.rpartition('/')[0]})"
        if not self._is_open:
            raise RuntimeError("the mesh was closed")
        answer = self._own.answer(request) if self._link is None else self._ask_leader(self._link, request, what)
        if answer is None:
            raise MeshAborted(f"{what}: aborted")
        return answer

    def _ask_leader(self, link: Link, request: _Set | _Get, what: str) -> _Answer:
        try:
            with self._lock:
                link.send(msgspec.msgpack.encode(request))
                frame = link.recv(self._spec.form_timeout_s)
        except PeerLost as error:
            raise PeerLost(what, "its rendezvous is gone", self.members[:1]) from error
        return msgspec.msgpack.decode(frame, type=_Values | None)


def _connect(spec: MeshSpec) -> Link:
    address, timeout_s = (spec.store_host, spec.store_port), spec.form_timeout_s
    return connect(
        address, spec.credentials, spec.rank, spec.member(0), timeout_s, timeout_s, "the leader's rendezvous"
    )
