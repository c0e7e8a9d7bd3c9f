"""The control link: small frames between the leader and every other rank, one TCP connection each.

Plans go out, results come back. A rank that has nothing to do sleeps in ``recv``, and learns that its leader is gone
from the connection's end (or, when a machine vanishes, from TCP's own timeouts). The driver's connection to a leader is
such a link as well, as seen from the leader.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost
from shardray.parallel.frames import LENGTH, framed, payload_len
from shardray.parallel.place import Member
from shardray.parallel.tls_socket import TlsSocket

_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # A machine that does not answer for so long has vanished: 11 s, in silence as with frames under way.
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 11_000),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18),  # what ``has_room`` promises, with some to spare
)
_log = logging.getLogger(__name__)


def set_options(setsockopt: Callable[[int, int, int], Any]) -> None:
    """Frames leave at once, and a peer whose machine vanished is noticed. ``setsockopt``: a socket's."""
    for option in _OPTIONS:
        setsockopt(*option)


def _timeval(seconds: float) -> bytes:
    """As the kernel reads it; zero waits for ever."""
    whole = 0 if seconds == math.inf else int(seconds)
    return struct.pack("ll", whole, 0 if seconds == math.inf else int((seconds - whole) * 1e6))


class Link:
    """One end of one connection. ``timeout_s`` bounds each ``send``; one thread sends and one receives."""

    def __init__(self, sock: socket.socket | TlsSocket, peer: Member, timeout_s: float) -> None:
        set_options(sock.setsockopt)
        # The kernel's own timeouts, one for each direction: Python's is one for both, and two threads would change it.
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        self._recv_timeout_s = math.inf
        self._socket = sock
        self._room = select.poll()
        self._room.register(sock.fileno(), select.POLLOUT)
        self._peer = peer
        self._timeout_s = timeout_s
        self._aborted = False

    def has_room(self) -> bool:
        """Whether a frame of at most 32 KiB can be sent without waiting for the peer."""
        return bool(self._room.poll(0))

    def send(self, payload: bytes) -> None:
        """Raises CollectiveTimeout when the peer has not taken the frame in time, PeerLost or MeshAborted."""
        frame = framed(payload)
        try:
            self._socket.sendall(frame)
        except BlockingIOError:
            raise CollectiveTimeout("control frame sent", self._timeout_s, [self._peer]) from None
        except OSError as error:
            raise self._lost(error) from error

    def recv(self, timeout_s: float | None = None) -> bytes:
        """The next frame's payload; blocks without using the CPU. Raises CollectiveTimeout, PeerLost or MeshAborted."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            header = self._recv_exactly(LENGTH.size, deadline)
            return self._recv_exactly(payload_len(header), deadline)
        except BlockingIOError:
            raise CollectiveTimeout("control frame awaited", timeout_s or 0.0, [self._peer]) from None
        except OSError as error:
            raise self._lost(error) from error

    def check(self) -> None:
        """Raise PeerLost if the connection has ended, MeshAborted after ``abort``. Does not wait."""
        try:
            if not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise ConnectionResetError("the connection was closed")
        except BlockingIOError:
            return  # connected, and nothing to read
        except OSError as error:
            raise self._lost(error) from error

    def abort(self) -> None:
        """Wake a blocked ``recv`` or ``send`` (it raises MeshAborted). Thread-safe."""
        self._aborted = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("control link to %s was closed already", self._peer)

    def close(self) -> None:
        self._socket.close()

    def _recv_exactly(self, num_bytes: int, deadline: float) -> bytes:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        while view:
            self._limit_recv(deadline)
            received = self._socket.recv_into(view)
            if received == 0:
                raise ConnectionResetError("the connection was closed")
            view = view[received:]
        return bytes(buffer)

    def _limit_recv(self, deadline: float) -> None:
        timeout_s = max(0.001, deadline - time.monotonic())
        if timeout_s != self._recv_timeout_s:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))
            self._recv_timeout_s = timeout_s

    def _lost(self, error: OSError) -> PeerLost | MeshAborted:
        if self._aborted:
            return MeshAborted(f"control link to {self._peer}: aborted")
        return PeerLost("control link", str(error), [self._peer])
