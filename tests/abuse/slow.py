"""Clients that ask for much and do not read it: their window stays shut, or not even their socket is read."""

from __future__ import annotations

import asyncio
from typing import Any

from shardray.v1 import common_pb2, inference_pb2
from tests.abuse.http2 import INITIAL_WINDOW_SIZE, PREFACE, Connection, Kind, call, settings, take
from tests.abuse.worker import tell

_WINDOW = 1000  # bytes of a stream before it has to be read
_HELLO = PREFACE + settings({INITIAL_WINDOW_SIZE: _WINDOW})


async def attack(
    address: str, told: asyncio.Queue[str | None], num_clients: int, max_tokens: int, timeout_s: float
) -> dict[str, Any]:
    """Open the streams, tell so, do nothing until told to go on; then the first half reads what came meanwhile.

    The other half stays as it is until the server has kept its deadline.
    """
    request = inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=range(5, 25)),
        sampling=common_pb2.SamplingParameters(max_tokens=max_tokens, ignore_eos=True, logprobs=5),
    ).SerializeToString()
    connections = [await Connection.open(address, _HELLO) for _ in range(num_clients)]
    for number, connection in enumerate(connections):
        deadline = {} if number < num_clients // 2 else {"grpc_timeout": f"{round(timeout_s)}S"}
        await connection.send(call(1, request, **deadline))
    idle = [asyncio.create_task(_only_answer(connection)) for connection in connections[: num_clients // 2]]
    tell({"open": num_clients})
    await told.get()
    read_first = [await _stop(task) for task in idle]
    got = await asyncio.gather(
        *(_read_on(one, first) for one, first in zip(connections[: num_clients // 2], read_first, strict=True))
    )
    tell({"read_on": [num_tokens for num_tokens, _ in got], "messages": [num_messages for _, num_messages in got]})
    await told.get()
    return {"shut_window_bytes": [len(first) for first in read_first]}


async def _only_answer(connection: Connection) -> bytes:
    """Read until cancelled, without ever making room for more; returns the data."""
    data = b""
    try:
        while True:
            received = await connection.next()
            await connection.answer(received)
            data += received.payload if received.kind == Kind.DATA else b""
    except asyncio.CancelledError:
        return data


async def _stop(task: asyncio.Task[bytes]) -> bytes:
    task.cancel()
    return await task


async def _read_on(connection: Connection, data: bytes) -> tuple[int, int]:
    """The tokens and the messages of the whole stream, the part that was read before included."""
    await connection.send(take(1, _WINDOW))
    while not (received := await connection.next()).ends_stream:
        await connection.answer(received)
        if received.kind == Kind.DATA:
            data += received.payload
            await connection.send(take(1, len(received.payload)))
    num_tokens = num_messages = 0
    while data:
        length = int.from_bytes(data[1:5], "big")
        num_tokens += len(inference_pb2.GenerateResponse.FromString(data[5 : 5 + length]).token_ids)
        num_messages += 1
        data = data[5 + length :]
    return num_tokens, num_messages
