"""Connections that say nothing, as many as the machine has files for."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from tests.abuse.http2 import ACK, PREFACE, Frame, Kind, frame
from tests.abuse.worker import tell

_AT_ONCE = 100
_HEAD_LEN = 9


class _Idle(asyncio.Protocol):
    """Greets as HTTP/2 does, acknowledges what must be, and keeps still. Much less memory than a pair of streams."""

    def __init__(self, greets: bool) -> None:
        self._greets = greets
        self._unread = b""
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._greets:
            transport.write(PREFACE + frame(Kind.SETTINGS))

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while len(self._unread) >= _HEAD_LEN:
            end = _HEAD_LEN + int.from_bytes(self._unread[:3], "big")
            if len(self._unread) < end:
                return
            kind, flags, payload = self._unread[3], self._unread[4], self._unread[_HEAD_LEN:end]
            self._unread = self._unread[end:]
            self._answer(Frame(kind, flags, 0, payload))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False

    def _answer(self, received: Frame) -> None:
        if received.kind in (Kind.SETTINGS, Kind.PING) and not received.flags & ACK:
            payload = received.payload if received.kind == Kind.PING else b""
            self._transport.write(frame(received.kind, ACK, payload=payload))


async def attack(
    address: str, told: asyncio.Queue[str | None], num_connections: int, mute_share: float = 0.1
) -> dict[str, Any]:
    """``mute_share`` of them do not even greet. Told to end, it says how many of each are open still."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, _, port = address.rpartition(":")
    loop, num_mute = asyncio.get_running_loop(), round(num_connections * mute_share)
    idle = [_Idle(greets=number >= num_mute) for number in range(min(num_connections, hard - 100))]
    for first in range(0, len(idle), _AT_ONCE):
        batch = idle[first : first + _AT_ONCE]
        await asyncio.gather(*(loop.create_connection(lambda one=one: one, host, int(port)) for one in batch))
    tell({"open": len(idle)})
    await told.get()
    still = [one.is_open for one in idle]
    return {"greeted_open": sum(still[num_mute:]), "mute_open": sum(still[:num_mute])}
