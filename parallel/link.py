"""The control link: small frames between the leader and every other rank, one TCP connection each.

Plans go out, results come back. A rank that has nothing to do sleeps in ``recv``, and learns that its leader is gone
from the connection's end. Every connection opens with a hello that carries the mesh's epoch and secret; one that does
not match is closed and logged.

    frame    | length: uint32, big endian | payload |
"""

from __future__ import annotations

import hmac
import json
import logging
import socket
import struct
import time

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost

_LENGTH = struct.Struct("!I")
_MAX_FRAME_BYTES = 1 << 28
_MAX_HELLO_BYTES = 4096
_log = logging.getLogger(__name__)


class Link:
    """One end of one connection."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._peer = peer
        self._aborted = False

    def send(self, frame: bytes) -> None:
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except TimeoutError:
            raise CollectiveTimeout(f"control frame to {self._peer}", self._socket.gettimeout() or 0.0) from None
        except OSError as error:
            raise self._lost(error) from error

    def recv(self, timeout_s: float | None = None, max_bytes: int = _MAX_FRAME_BYTES) -> bytes:
        """The next frame; blocks without using the CPU. Raises CollectiveTimeout, PeerLost or MeshAborted."""
        self._socket.settimeout(timeout_s)
        try:
            (length,) = _LENGTH.unpack(self._recv_exactly(_LENGTH.size))
            if length > max_bytes:
                raise PeerLost(f"control frame from {self._peer}", f"a frame of {length} bytes is not one of ours")
            return self._recv_exactly(length)
        except TimeoutError:
            raise CollectiveTimeout(f"control frame from {self._peer}", timeout_s or 0.0) from None
        except OSError as error:
            raise self._lost(error) from error

    def abort(self) -> None:
        """Wake a blocked ``recv`` (it raises MeshAborted). Thread-safe."""
        self._aborted = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("control link to %s was closed already", self._peer)

    def close(self) -> None:
        self._socket.close()

    def _recv_exactly(self, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        while view:
            received = self._socket.recv_into(view)
            if received == 0:
                raise ConnectionResetError("the connection was closed")
            view = view[received:]
        return bytes(buffer)

    def _lost(self, error: OSError) -> PeerLost | MeshAborted:
        if self._aborted:
            return MeshAborted(f"control link to {self._peer}: aborted")
        return PeerLost(f"control link to {self._peer}", str(error))


class LinkListener:
    """The leader's side while a mesh forms."""

    def __init__(self, bind_host: str, epoch: str, secret: str) -> None:
        self._socket = socket.create_server((bind_host, 0))
        self._epoch = epoch
        self._secret = secret
        self.port: int = self._socket.getsockname()[1]

    def accept(self, ranks: set[int], timeout_s: float) -> dict[int, Link]:
        """A link to each of ``ranks``. Raises CollectiveTimeout naming those that did not come in time."""
        links: dict[int, Link] = {}
        deadline = time.monotonic() + timeout_s
        while missing := ranks - links.keys():
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                sock, address = self._socket.accept()
            except TimeoutError:
                raise CollectiveTimeout("forming the control links", timeout_s, tuple(sorted(missing))) from None
            rank = self._greet(sock, f"{address[0]}:{address[1]}")
            if rank in missing:
                links[rank] = Link(sock, f"rank {rank}")
            else:
                sock.close()
        return links

    def close(self) -> None:
        self._socket.close()

    def _greet(self, sock: socket.socket, address: str) -> int | None:
        """The rank that a proper hello names."""
        try:
            hello = json.loads(Link(sock, address).recv(timeout_s=2.0, max_bytes=_MAX_HELLO_BYTES))
            if hmac.compare_digest(hello["secret"], self._secret) and hello["epoch"] == self._epoch:
                return int(hello["rank"])
            _log.warning("refused a control connection from %s: wrong epoch or secret", address)
        except (PeerLost, CollectiveTimeout, ValueError, KeyError, TypeError) as error:
            _log.warning("refused a control connection from %s: %s", address, error)
        return None


def connect(host: str, port: int, epoch: str, secret: str, rank: int, timeout_s: float) -> Link:
    """A worker's link to its leader. Raises PeerLost when nobody listens there."""
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise PeerLost(f"control link to leader {host}:{port}", str(error)) from error
    link = Link(sock, "leader")
    link.send(json.dumps({"epoch": epoch, "secret": secret, "rank": rank}).encode())
    return link
