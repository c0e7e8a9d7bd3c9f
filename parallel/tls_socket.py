"""A TLS connection over a TCP socket, with the few methods of a socket that links use.

One thread may send while another one receives: OpenSSL's state is touched under a lock that is never held during
input or output, which ``ssl.SSLSocket`` does not promise. The handshake is made by whichever call comes first, blocking
or not.
"""

from __future__ import annotations

import socket
import ssl
import threading

from shardray.parallel.tls import NAME, check_name, reason_of

_CHUNK_BYTES = 1 << 16


class TlsSocket:
    """Errors are those of a socket; what TLS itself refuses is a ConnectionAbortedError with the reason."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, is_server: bool) -> None:
        self._socket = sock
        self._is_server = is_server
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if is_server else NAME
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server, server_hostname=name)
        self._is_open = False  # the handshake is complete
        self._lock = threading.Lock()  # of everything above
        self._sending = threading.Lock()  # keeps records in order; taken before the other one

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._socket.setsockopt(level, option, value)

    def settimeout(self, timeout_s: float | None) -> None:
        self._socket.settimeout(timeout_s)

    def fileno(self) -> int:
        return self._socket.fileno()

    def sendall(self, data: bytes) -> None:
        while not self._is_open:
            if self._read(bytearray()) is None:
                self._fill()
        with self._sending:
            with self._lock:
                self._tls.write(data)
                records = self._outgoing.read()
            self._socket.sendall(records)
        self._flush()

    def recv(self, num_bytes: int, flags: int = 0) -> bytes:
        """With MSG_PEEK: whether the TCP connection has ended (empty), nothing about its contents."""
        if flags:
            return self._socket.recv(num_bytes, flags)
        buffer = bytearray(num_bytes)
        return bytes(buffer[: self.recv_into(buffer)])

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        while (received := self._read(buffer)) is None:
            self._fill()
        return received

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()

    def _read(self, buffer: bytearray | memoryview) -> int | None:
        """How much was read from what has arrived; None if more has to arrive. An empty buffer: only shake hands."""
        try:
            with self._lock:
                if not self._is_open:
                    self._tls.do_handshake()
                    if self._is_server:
                        check_name(self._tls)
                    self._is_open = True
                return int(self._tls.read(len(buffer), buffer)) if buffer else 0
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            if not self._is_open:
                raise ConnectionResetError("the connection was closed during the TLS handshake") from None
            return 0
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason_of(error)}") from None
        finally:
            self._flush()

    def _flush(self) -> None:
        """Send what TLS itself has to say: handshake, alerts. Whoever is sending just now does it afterwards: to wait
        for that while receiving would stop both ends, each waiting for the other to take what it sends."""
        while self._outgoing.pending and self._sending.acquire(blocking=False):
            try:
                with self._lock:
                    records = self._outgoing.read()
                self._socket.sendall(records)
            finally:
                self._sending.release()

    def _fill(self) -> None:
        data = self._socket.recv(_CHUNK_BYTES)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
