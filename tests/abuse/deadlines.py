"""Whether the server keeps the deadline of a call by itself: its client says it once and never ends the call."""

from __future__ import annotations

import asyncio
import time

from shardray.v1 import common_pb2, inference_pb2
from tests.abuse.http2 import Connection, Kind, call, take

_PAUSE_S = 0.05
_PATIENCE_S = 10.0


async def keep_probing(address: str, until_s: float) -> dict[str, list[float]]:
    """Seconds that calls ended after their deadline: of those that were waiting, and of those that were decoding."""
    waiting, decoding = await asyncio.gather(
        _probe(address, until_s, priority=100, timeout_s=0.2), _probe(address, until_s, priority=-100, timeout_s=1.0)
    )
    late_s: dict[str, list[float]] = {"queue": [], "decode": []}
    for has_tokens, seconds in (*waiting, *decoding):
        late_s["decode" if has_tokens else "queue"].append(round(seconds, 3))
    return late_s


async def _probe(address: str, until_s: float, priority: int, timeout_s: float) -> list[tuple[bool, float]]:
    found = []
    while time.monotonic() < until_s:
        found += [one for one in [await _ask(address, priority, timeout_s)] if one is not None]
        await asyncio.sleep(_PAUSE_S)
    return found


async def _ask(address: str, priority: int, timeout_s: float) -> tuple[bool, float] | None:
    """Whether there were tokens, and seconds from the deadline to the end; None if it ended before, or was refused."""
    request = inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=[9]),
        sampling=common_pb2.SamplingParameters(max_tokens=1000, ignore_eos=True),
        priority=priority,
    )
    connection = await Connection.open(address)
    began_s, has_tokens = time.monotonic(), False
    try:
        await connection.send(call(1, request.SerializeToString(), grpc_timeout=f"{round(timeout_s * 1000)}m"))
        async with asyncio.timeout(timeout_s + _PATIENCE_S):
            while not (received := await connection.next()).ends_stream:
                await connection.answer(received)
                if received.kind == Kind.DATA:
                    has_tokens = True
                    await connection.send(take(1, len(received.payload)))
    except TimeoutError:
        return has_tokens, _PATIENCE_S
    finally:
        connection.reset()
    late_s = time.monotonic() - began_s - timeout_s
    return None if late_s < -0.01 else (has_tokens, late_s)
