"""The control link: small frames between the leader and every other rank, one TCP connection each.

Plans go out, results come back. A rank that has nothing to do sleeps in ``recv``, and learns that its leader is gone
from the connection's end (or, when a machine vanishes, from TCP keepalive).

    frame    | length: uint32, big endian | payload |
"""

from __future__ import annotations

import logging
import socket
import struct
import time

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost
from shardray.parallel.place import Member
from shardray.parallel.tls_socket import TlsSocket

LENGTH = struct.Struct("!I")
_MAX_FRAME_BYTES = 1 << 28
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),  # seconds of silence before the first probe
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_log = logging.getLogger(__name__)


class Link:
    """One end of one connection. ``timeout_s`` bounds each ``send``; one thread sends and one receives."""

    def __init__(self, sock: socket.socket | TlsSocket, peer: Member, timeout_s: float) -> None:
        for option in _OPTIONS:
            sock.setsockopt(*option)
        self._socket = sock
        self._peer = peer
        self._timeout_s = timeout_s
        self._aborted = False

    def send(self, frame: bytes) -> None:
        """Raises CollectiveTimeout when the peer has not taken the frame in time, PeerLost or MeshAborted."""
        if len(frame) > _MAX_FRAME_BYTES:
            raise ValueError(f"a control frame of {len(frame)} bytes exceeds {_MAX_FRAME_BYTES}")
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.sendall(LENGTH.pack(len(frame)) + frame)
        except TimeoutError:
            raise CollectiveTimeout("control frame sent", self._timeout_s, [self._peer]) from None
        except OSError as error:
            raise self._lost(error) from error

    def recv(self, timeout_s: float | None = None) -> bytes:
        """The next frame; blocks without using the CPU. Raises CollectiveTimeout, PeerLost or MeshAborted."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            (length,) = LENGTH.unpack(self._recv_exactly(LENGTH.size, deadline))
            if length > _MAX_FRAME_BYTES:
                raise ConnectionAbortedError(f"a frame of {length} bytes is not one of ours")
            return self._recv_exactly(length, deadline)
        except TimeoutError:
            raise CollectiveTimeout("control frame awaited", timeout_s or 0.0, [self._peer]) from None
        except OSError as error:
            raise self._lost(error) from error

    def check(self) -> None:
        """Raise PeerLost if the connection has ended, MeshAborted after ``abort``. Does not wait."""
        try:
            self._socket.settimeout(0)
            if not self._socket.recv(1, socket.MSG_PEEK):
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

    def _recv_exactly(self, num_bytes: int, deadline: float | None) -> bytes:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        while view:
            self._socket.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            received = self._socket.recv_into(view)
            if received == 0:
                raise ConnectionResetError("the connection was closed")
            view = view[received:]
        return bytes(buffer)

    def _lost(self, error: OSError) -> PeerLost | MeshAborted:
        if self._aborted:
            return MeshAborted(f"control link to {self._peer}: aborted")
        return PeerLost("control link", str(error), [self._peer])
