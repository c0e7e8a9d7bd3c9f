"""Just enough of HTTP/2 (RFC 9113) and of gRPC's framing to say what no library would send, one byte at a time."""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GENERATE = "/shardray.v1.InferenceService/Generate"
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4  # a parameter of SETTINGS
CANCEL = 8  # an error code
_HEAD = struct.Struct(">BHBBI")  # 24 bits of length, type, flags, stream


class Kind(enum.IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        return self.kind == Kind.RST_STREAM or (self.kind == Kind.HEADERS and bool(self.flags & END_STREAM))


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(Kind.SETTINGS, payload=b"".join(struct.pack(">HI", key, value) for key, value in values.items()))


def window_update(stream_id: int, num_bytes: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, stream_id=stream_id, payload=struct.pack(">I", num_bytes))


def take(stream_id: int, num_bytes: int) -> bytes:
    """Room for as many bytes as were read, of the stream and of the connection."""
    return b"".join(window_update(one, max(1, num_bytes)) for one in (0, stream_id))


def rst_stream(stream_id: int) -> bytes:
    return frame(Kind.RST_STREAM, stream_id=stream_id, payload=struct.pack(">I", CANCEL))


def header_block(fields: list[tuple[str, str]]) -> bytes:
    """HPACK, each field literally, without index and Huffman code."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def headers(stream_id: int, path: str = GENERATE, flags: int = END_HEADERS, **more: str) -> bytes:
    """The head of a call; ``more`` replaces or adds fields, with underscores for dashes."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    } | {name.replace("_", "-"): value for name, value in more.items()}
    return frame(Kind.HEADERS, flags, stream_id, header_block(list(fields.items())))


def message(payload: bytes, length: int | None = None) -> bytes:
    """A gRPC message; ``length`` is what its head says, if that is to be a lie."""
    return struct.pack(">BI", 0, len(payload) if length is None else length) + payload


def call(stream_id: int, payload: bytes, path: str = GENERATE, **more: str) -> bytes:
    """A whole unary request."""
    return headers(stream_id, path, **more) + frame(Kind.DATA, END_STREAM, stream_id, message(payload))


class Connection:
    """One TCP connection whose every byte the caller decides upon."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: str, first: bytes = PREFACE + frame(Kind.SETTINGS)) -> Connection:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
        connection = cls(reader, writer)
        await connection.send(first)
        return connection

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def next(self) -> Frame:
        """The next frame. Raises IncompleteReadError or ConnectionError at the connection's end."""
        high, low, kind, flags, stream_id = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
        payload = await self.reader.readexactly(high << 16 | low)
        return Frame(kind, flags, stream_id & 0x7FFFFFFF, payload)

    async def answer(self, received: Frame) -> None:
        """What keeps a connection alive: acknowledge settings and pings, and nothing else."""
        if received.kind in (Kind.SETTINGS, Kind.PING) and not received.flags & ACK:
            await self.send(frame(received.kind, ACK, payload=received.payload if received.kind == Kind.PING else b""))

    def reset(self) -> None:
        """End the TCP connection with RST, as a machine that was switched off and on would."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def _text(value: str) -> bytes:
    data = value.encode()
    return _number(len(data)) + data


def _number(value: int) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes([value])
    rest, data = value - 127, [127]
    while rest >= 128:
        data.append(rest % 128 + 128)
        rest //= 128
    return bytes([*data, rest])
