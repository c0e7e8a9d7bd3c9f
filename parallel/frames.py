"""How messages are told apart on the connections inside the cluster.

frame    | length: uint32, big endian | payload |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

LENGTH = struct.Struct("!I")
_MAX_PAYLOAD_BYTES = 1 << 28


def framed(payload: bytes) -> bytes:
    """Raises ValueError for what no peer would take."""
    if len(payload) > _MAX_PAYLOAD_BYTES:
        raise ValueError(f"a control frame of {len(payload)} bytes exceeds {_MAX_PAYLOAD_BYTES}")
    return LENGTH.pack(len(payload)) + payload


def payload_len(header: bytes | bytearray) -> int:
    """What the first four bytes of a frame announce. Raises ConnectionAbortedError if that is more than any of ours."""
    (length,) = LENGTH.unpack_from(header)
    if length > _MAX_PAYLOAD_BYTES:
        raise ConnectionAbortedError(f"a frame of {length} bytes is not one of ours")
    return int(length)


class FrameReader:
    """Frames out of bytes as they arrive."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are complete now. Raises ConnectionAbortedError."""
        self._received += data
        while len(self._received) >= LENGTH.size:
            end = LENGTH.size + payload_len(self._received)
            if len(self._received) < end:
                return
            payload = bytes(self._received[LENGTH.size : end])
            del self._received[:end]
            yield payload
