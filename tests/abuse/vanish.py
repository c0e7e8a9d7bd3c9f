"""Clients that go in the middle of what they asked for: by a reset, by a cancel, by kill -9; waiting or streaming."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from shardray.v1 import common_pb2, inference_pb2
from tests.abuse.http2 import Connection, Kind, call, rst_stream, take
from tests.abuse.worker import tell

_REQUEST = inference_pb2.GenerateRequest(
    token_ids=common_pb2.TokenIds(ids=range(5, 25)),
    sampling=common_pb2.SamplingParameters(max_tokens=900, ignore_eos=True),
).SerializeToString()
_MOST_TOKENS = 3  # that a client reads before it goes
_PATIENCE_S = 5.0  # for them; then it goes from the queue


async def attack(
    address: str,
    told: asyncio.Queue[str | None],
    num_clients: int,
    at_once: int = 12,
    stay: bool = False,
    seed: int = 1,
) -> dict[str, Any]:
    """``stay``: the clients do not go; their process says how many stream, and waits for its end."""
    rng = random.Random(seed)
    places = asyncio.Semaphore(at_once)
    counts: Counter[str] = Counter()

    async def come_and_go(way: str) -> None:
        async with places:
            connection = await Connection.open(address)
            num_tokens = await _stream(connection, rng.randint(0, _MOST_TOKENS))
            counts[f"{way}, {'streaming' if num_tokens else 'waiting or refused'}"] += 1
            await _leave(connection, way)

    if stay:
        connections = [await Connection.open(address) for _ in range(num_clients)]
        streaming = await asyncio.gather(*(_stream(connection, 1) for connection in connections))
        tell({"streaming": sum(num_tokens > 0 for num_tokens in streaming)})
        await told.get()
    else:
        await asyncio.gather(*(come_and_go(rng.choice(("reset", "cancel", "close"))) for _ in range(num_clients)))
    return dict(counts)


async def _stream(connection: Connection, num_wanted: int) -> int:
    """Ask, and read that many messages, if they come."""
    await connection.send(call(1, _REQUEST))
    num_read = 0
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while num_read < num_wanted and not (received := await connection.next()).ends_stream:
                await connection.answer(received)
                if received.kind == Kind.DATA:
                    num_read += 1
                    await connection.send(take(1, len(received.payload)))
    except TimeoutError:
        pass  # it goes while it waits
    return num_read


async def _leave(connection: Connection, way: str) -> None:
    if way == "cancel":
        await connection.send(rst_stream(1))
        await asyncio.sleep(0.05)  # the connection outlives its call
    if way == "close":
        connection.writer.close()
    else:
        connection.reset()
