"""What no client library sends: garbage, floods, and calls that say one thing and do another."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from shardray.v1 import common_pb2, inference_pb2
from tests.abuse.http2 import (
    END_HEADERS,
    END_STREAM,
    PREFACE,
    Connection,
    Kind,
    call,
    frame,
    header_block,
    headers,
    message,
    rst_stream,
    settings,
    window_update,
)

_HELLO = PREFACE + frame(Kind.SETTINGS)
_FLOOD = 2000
_READ_S = 0.2  # after which an attack ends
_REQUEST = inference_pb2.GenerateRequest(
    token_ids=common_pb2.TokenIds(ids=[5, 6, 7]),
    sampling=common_pb2.SamplingParameters(max_tokens=900, ignore_eos=True),
).SerializeToString()
_TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(190)
_LAST_STREAM = 2**31 - 1


def _random_frames(rng: random.Random) -> bytes:
    return b"".join(
        frame(rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3, _LAST_STREAM)), rng.randbytes(size))
        for size in (rng.randrange(200) for _ in range(20))
    )


def _rapid_reset(rng: random.Random) -> bytes:
    """Calls that are cancelled in the same breath (CVE-2023-44487)."""
    return b"".join(call(number, _REQUEST) + rst_stream(number) for number in range(1, _FLOOD // 2, 2))


def _endless_head(rng: random.Random) -> bytes:
    """A head that is continued and continued (CVE-2024-27316)."""
    more = frame(Kind.CONTINUATION, 0, 1, header_block([("x", "y" * 1000)]))
    return headers(1, flags=0) + more * (_FLOOD // 4)


# What each sends behind a proper greeting.
_SPOKEN: dict[str, Callable[[random.Random], bytes]] = {
    "random frames": _random_frames,
    "settings flood": lambda rng: settings({4: 1000}) * _FLOOD,
    "ping flood": lambda rng: frame(Kind.PING, payload=rng.randbytes(8)) * _FLOOD,
    "empty data flood": lambda rng: headers(1) + frame(Kind.DATA, 0, 1) * _FLOOD,
    "rapid reset": _rapid_reset,
    "endless head": _endless_head,
    "huge head": lambda rng: headers(1, x_huge="y" * 15_000) + headers(3, x_huge="y" * 16_000),
    "broken head": lambda rng: frame(Kind.HEADERS, END_HEADERS, 1, rng.randbytes(60)),
    "head and no more": lambda rng: headers(1),
    "window of nothing": lambda rng: headers(1) + window_update(1, 0),
    "window too wide": lambda rng: headers(1) + window_update(1, 2**31 - 1) * 2,
    "shut window": lambda rng: settings({4: 0}) + call(1, _REQUEST),
    "settings out of range": lambda rng: settings({4: 2**32 - 1, 5: 0}),
    "data without a call": lambda rng: frame(Kind.DATA, END_STREAM, 1, message(_REQUEST)),
    "even stream": lambda rng: call(2, _REQUEST),
    "message cut short": lambda rng: headers(1) + frame(Kind.DATA, END_STREAM, 1, message(_REQUEST, 10_000)),
    "message of 4 GiB": lambda rng: headers(1) + frame(Kind.DATA, 0, 1, message(_REQUEST, 2**32 - 1)),
    "no message": lambda rng: headers(1, flags=END_HEADERS | END_STREAM),
    "two messages": lambda rng: headers(1) + frame(Kind.DATA, END_STREAM, 1, message(_REQUEST) * 2),
    "compressed with nothing": lambda rng: headers(1) + frame(Kind.DATA, END_STREAM, 1, b"\x01" + struct.pack(">I", 3)),
    "random message": lambda rng: call(1, rng.randbytes(rng.randrange(1, 300))),
    "proto cut short": lambda rng: call(1, _REQUEST[: rng.randrange(1, len(_REQUEST))]),
    "wrong content type": lambda rng: call(1, _REQUEST, content_type="text/html"),
    "GET": lambda rng: call(1, _REQUEST, **{":method": "GET"}),
    "unknown method": lambda rng: call(1, _REQUEST, "/shardray.v1.InferenceService/Nothing"),
    "replica's service": lambda rng: call(1, b"", "/shardray.v1.ReplicaService/Run"),
    "nonsense deadline": lambda rng: call(1, _REQUEST, grpc_timeout=rng.choice(("-1S", "9999999999999S", "x", ""))),
    "GOAWAY": lambda rng: frame(Kind.GOAWAY, payload=struct.pack(">II", 0, 11)) + call(1, _REQUEST),
}
# What each sends instead of a greeting.
_UNSPOKEN: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": lambda rng: rng.randbytes(rng.randrange(1, 4000)),
    "HTTP/1.1": lambda rng: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "TLS": lambda rng: _TLS_HELLO,
    "half a preface": lambda rng: PREFACE[: rng.randrange(1, len(PREFACE))],
    "preface and garbage": lambda rng: PREFACE + rng.randbytes(500),
}
ATTACKS = {name: lambda rng, make=make: _HELLO + make(rng) for name, make in _SPOKEN.items()} | _UNSPOKEN


async def attack(address: str, told: asyncio.Queue[str | None], pause_s: float = 0.02, seed: int = 1) -> dict[str, Any]:
    """One after the other, over and over, until told to end; how often each was made and who ended the connection."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    num_closed = 0
    while told.empty():
        for name, make in ATTACKS.items():
            num_closed += await _attack(address, make(rng))
            counts[name] += 1
            await asyncio.sleep(pause_s)
    return {"attacks": dict(counts), "closed_by_server": num_closed}


async def _attack(address: str, data: bytes) -> bool:
    """Whether the server ended the connection first."""
    connection = await Connection.open(address, first=b"")
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READ_S):
                await connection.send(data)
                while await connection.reader.read(65_536):
                    pass
                return True
    except ConnectionError:
        return True
    finally:
        connection.reset()
    return False
