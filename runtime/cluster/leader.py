"""The leader's side of its driver's connection: commands go into the engine, its tokens come out.

A thread per driver waits for commands. Tokens are sent by the engine's own thread, between two steps: nothing has to
wake up for them. It never waits for a driver: what one has not taken yet is merged into the next message.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import MeshError
from shardray.parallel.greeting import Door
from shardray.parallel.link import Link
from shardray.parallel.place import Member
from shardray.runtime.cluster.messages import DRIVER_RANK, Cancel, Command, Events, ForgetPrefixes, Rejection, Submit
from shardray.runtime.engine.request import EngineRequest, EngineStats, FieldError, ServedModel, TokenOutput

STATS_INTERVAL_S = 0.5
_STOP_TIMEOUT_S = 2.0
_SEND_TIMEOUT_S = 30.0  # of a driver that takes nothing
_SMALL_BYTES = 32 << 10
_log = logging.getLogger(__name__)


class LinkedEngine(Protocol):
    """The thread-safe part of the engine."""

    @property
    def info(self) -> ServedModel: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def forget_prefixes(self) -> None: ...
    def stats(self) -> EngineStats: ...


class LeaderServer:
    """Serves one engine to its driver. Between start and stop, its owner runs ``engine.run(server.publish)``."""

    def __init__(self) -> None:
        self._door: Door | None = None
        self._drivers: set[_DriverLink] = set()
        self._owners: dict[str, _DriverLink] = {}  # by request id
        self._told_s = 0.0  # when statistics were sent last
        self._end: str | None = None  # why it was stopped
        self._lock = threading.Lock()  # of the above

    def start(self, bind_host: str, engine: LinkedEngine, credentials: Credentials) -> int:
        """Listen on a free port of ``bind_host`` and return the port. Only who says the mesh's secret is served, and
        with ``credentials.tls`` only over connections with a certificate for the cluster's name.

        Raises RuntimeError if nothing can listen on that host, TlsError.
        """
        if not credentials.secret:
            raise ValueError("secret is empty: anyone could send requests to the engine")
        try:
            self._door = Door(bind_host, credentials, "driver")
        except OSError as error:
            raise RuntimeError(f"the leader cannot listen on {bind_host}: {error}") from None
        self._engine = engine
        self._welcomer = threading.Thread(target=self._welcome, args=(self._door,), name="leader-door", daemon=True)
        self._welcomer.start()
        return self._door.port

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send one step's outputs. Does not block; call it from one thread. Outputs after stop are dropped."""
        batches: dict[_DriverLink, list[TokenOutput]] = {}
        with self._lock:
            for output in outputs:
                if (driver := self._owners.get(output.request_id)) is not None:
                    batches.setdefault(driver, []).append(output)
                    if output.finish_reason is not None:
                        del self._owners[output.request_id]
            stats = self._due_stats()
            drivers = batches if stats is None else tuple(self._drivers)
        for driver in drivers:
            driver.send(Events(batches.get(driver, []), stats=stats))

    def stop(self, reason: str = "the replica was stopped") -> None:
        """Tell every driver ``reason``, after what is pending, and stop listening. Thread-safe and idempotent."""
        if self._door is not None:
            self._door.close()
            self._welcomer.join(_STOP_TIMEOUT_S)
        with self._lock:
            self._end = self._end or reason
            drivers = tuple(self._drivers)
        for driver in drivers:
            driver.send(Events(end=self._end))
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for driver in drivers:
            driver.close(max(0.0, deadline - time.monotonic()))

    def _welcome(self, door: Door) -> None:
        awaited = {DRIVER_RANK: Member(DRIVER_RANK, 0, 0)}
        for rank, link in door.enter(awaited, _SEND_TIMEOUT_S, math.inf):
            awaited[rank] = Member(rank, 0, 0)  # the next one, when this one is gone
            driver = _DriverLink(link, self._run)
            driver.greet(self._engine.info, self._engine.stats())
            with self._lock:
                self._drivers.add(driver)
                end = self._end
            driver.start()
            if end is not None:  # it came while the server stopped
                driver.send(Events(end=end))

    def _run(self, driver: _DriverLink) -> None:
        """Do what a driver asks for until it is gone; then free what it had asked for."""
        try:
            while True:
                match driver.recv():
                    case Submit(request):
                        self._submit(request, driver)
                    case Cancel(request_id):
                        self._engine.cancel(request_id)
                    case ForgetPrefixes():
                        self._engine.forget_prefixes()
        except MeshError as error:
            _log.debug("a driver is gone: %s", error)
        except msgspec.MsgspecError as error:
            _log.warning("a driver sent what is no command, is it of another version? Its connection ends: %s", error)
        finally:
            driver.drop()
            with self._lock:
                self._drivers.discard(driver)
                left = [request_id for request_id, owner in self._owners.items() if owner is driver]
                for request_id in left:
                    del self._owners[request_id]
            for request_id in left:
                self._engine.cancel(request_id)

    def _submit(self, request: EngineRequest, driver: _DriverLink) -> None:
        # Before the engine knows of it: its first token may be on its way before submit returns.
        with self._lock:
            self._owners[request.request_id] = driver
        try:
            self._engine.submit(request)
        except FieldError as error:
            with self._lock:
                del self._owners[request.request_id]
            driver.send(Events(rejections=[Rejection(request.request_id, error.field, error.message)]))

    def _due_stats(self) -> EngineStats | None:
        now = time.monotonic()
        if self._owners and now - self._told_s < STATS_INTERVAL_S:
            return None
        self._told_s = now
        return self._engine.stats()


class _DriverLink:
    """One driver's connection. ``send`` may be called from any thread, ``recv`` from one."""

    def __init__(self, link: Link, serve: Callable[[_DriverLink], None]) -> None:
        self._link = link
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._pending: Events | None = None
        self._writes = False  # a thread sends what is pending
        self._lock = threading.Lock()  # of what is pending, and of sending
        self._reader = threading.Thread(target=serve, args=(self,), name="leader-driver", daemon=True)

    def greet(self, model: ServedModel, stats: EngineStats) -> None:
        """Tell the driver what is served; before anything else."""
        self._send(msgspec.msgpack.encode(model))
        self.send(Events(stats=stats))

    def start(self) -> None:
        """Do what the driver asks for, in a thread."""
        self._reader.start()

    def recv(self) -> Command:
        """The next command. Raises MeshError when the driver is gone."""
        command: Command = self._decoder.decode(self._link.recv())
        return command

    def send(self, events: Events) -> None:
        """In this thread if that needs no waiting; else in one that waits, together with what comes meanwhile."""
        with self._lock:
            if self._pending is not None:
                self._pending.merge(events)
            else:
                self._pending = events
            if self._writes:
                return
            payload = msgspec.msgpack.encode(self._pending)
            self._pending = None
            if len(payload) <= _SMALL_BYTES and self._link.has_room():
                self._send(payload)
            else:
                self._writes = True
                threading.Thread(target=self._write, args=(payload,), name="leader-writer", daemon=True).start()

    def close(self, timeout_s: float) -> None:
        """The end was sent: wait until the driver has gone by itself, then end the connection."""
        self._reader.join(timeout_s)
        self._link.abort()

    def drop(self) -> None:
        """The driver is gone."""
        self._link.abort()
        with self._lock:
            self._link.close()

    def _write(self, payload: bytes) -> None:
        """Send it, and what came meanwhile."""
        while True:
            self._send(payload)
            with self._lock:
                events, self._pending = self._pending, None
                self._writes = events is not None
            if events is None:
                return
            payload = msgspec.msgpack.encode(events)

    def _send(self, payload: bytes) -> None:
        try:
            self._link.send(payload)
        except MeshError as error:
            _log.debug("a driver takes nothing more: %s", error)
            self._link.abort()  # wakes ``recv``, which tells
