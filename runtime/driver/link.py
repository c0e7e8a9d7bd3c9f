"""The driver's side of the connection to one replica's leader."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from typing import cast

import msgspec

from shardray.parallel.credentials import Credentials
from shardray.parallel.frames import FrameReader, framed
from shardray.parallel.greeting import hello
from shardray.parallel.link import set_options
from shardray.parallel.tls import NAME, TlsError, reason_of
from shardray.runtime.cluster.messages import DRIVER_RANK, Cancel, Command, Events, ForgetPrefixes, Rejection, Submit
from shardray.runtime.engine.request import EngineRequest, EngineStats, ServedModel, TokenOutput


class LinkError(ConnectionError):
    """A replica's leader cannot be reached or refuses the driver."""


class ReplicaLink(asyncio.Protocol):
    """One connection to one leader; use it in the loop that made it.

    ``on_events(outputs, rejections)`` is called in that loop, once for each message. ``closed`` resolves to the reason
    when the connection has ended, whoever ended it.
    """

    def __init__(
        self,
        on_events: Callable[[list[TokenOutput], list[Rejection]], None],
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.stats = EngineStats()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._on_events = on_events
        self._on_stats = on_stats
        self._frames = FrameReader()
        self._is_welcome = False
        self._model: asyncio.Future[ServedModel] = loop.create_future()
        self._decoder = msgspec.msgpack.Decoder(Events)
        self._transport: asyncio.Transport | None = None
        self._end: str | None = None

    async def connect(self, address: str, credentials: Credentials, timeout_s: float = 10.0) -> ServedModel:
        """Open the connection; returns what the replica serves. Raises LinkError with the reason in one line."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._open(address, credentials)
                return await self._model
        except TimeoutError:
            self._abort()
            raise LinkError(f"the leader at {address} did not answer within {timeout_s:g} s") from None
        except TlsError as error:
            raise LinkError(str(error)) from error
        except OSError as error:
            raise LinkError(f"the leader at {address} cannot be reached: {_reason(error)}") from None

    def submit(self, request: EngineRequest) -> None:
        self._send(Submit(request))

    def cancel(self, request_id: str) -> None:
        self._send(Cancel(request_id))

    def forget_prefixes(self) -> None:
        self._send(ForgetPrefixes())

    async def close(self) -> None:
        """End the connection; the leader cancels what is left. Idempotent."""
        if self._transport is not None:
            self._end = self._end or "the driver closed the link"
            self._abort()
            await asyncio.wait([self.closed])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        set_options(transport.get_extra_info("socket").setsockopt)

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            if self._model.done():
                self._take(self._decoder.decode(payload))
            elif self._is_welcome:
                self._model.set_result(msgspec.msgpack.decode(payload, type=ServedModel))
            else:
                self._is_welcome = True

    def connection_lost(self, error: Exception | None) -> None:
        if not self._model.done():
            self._model.set_exception(error if isinstance(error, OSError) else ConnectionResetError(_TURNED_AWAY))
        lost = "the connection to its leader was lost"
        self.closed.set_result(self._end or (lost if error is None else f"{lost} ({error})"))

    async def _open(self, address: str, credentials: Credentials) -> None:
        host, _, port = address.rpartition(":")
        tls = None if credentials.tls is None else credentials.tls.client_context()
        await asyncio.get_running_loop().create_connection(
            lambda: self, host.strip("[]"), int(port), ssl=tls, server_hostname=None if tls is None else NAME
        )
        self._write(hello(credentials, DRIVER_RANK))

    def _take(self, events: Events) -> None:
        if events.stats is not None:
            self.stats = events.stats
            self._on_stats(events.stats)
        if events.outputs or events.rejections:
            self._on_events(events.outputs, events.rejections)
        if events.end is not None:
            self._end = self._end or events.end
            self._abort()

    def _send(self, command: Command) -> None:
        self._write(msgspec.msgpack.encode(command))

    def _write(self, payload: bytes) -> None:
        if self._transport is not None:
            self._transport.write(framed(payload))

    def _abort(self) -> None:
        """What has not been sent is of no use any more."""
        if self._transport is not None:
            self._transport.abort()


_TURNED_AWAY = "it closed the connection: its mesh is another one, or has another secret; its log says why"


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {reason_of(error)}"
    return os.strerror(error.errno) if error.errno else str(error)
