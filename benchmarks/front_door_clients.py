"""Clients of the front door's benchmark: as many as there are streams, each with a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from shardray.v1 import common_pb2, inference_pb2, inference_pb2_grpc

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
_CONNECT_AT_ONCE = 32


@dataclass
class Seen:
    """What all clients have received; a reader of it takes differences."""

    num_messages: int = 0
    num_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between two messages of one stream


def make_request(number: int, max_tokens: int) -> inference_pb2.GenerateRequest:
    """A prompt of its own for each client."""
    return inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=(5 + number % 256, 9, 77, 100, 120)),
        sampling=common_pb2.SamplingParameters(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )


@contextlib.asynccontextmanager
async def streams(address: str, count: int, max_tokens: int) -> AsyncIterator[Seen]:
    """``count`` streams that are read for as long as the context lasts; raises what ends one of them before."""
    seen = Seen()
    connecting = asyncio.Semaphore(_CONNECT_AT_ONCE)

    async def read(number: int) -> None:
        async with grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) as channel:
            async with connecting:
                await channel.channel_ready()
            last_s: float | None = None
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            async for response in stub.Generate(make_request(number, max_tokens)):
                now_s = time.perf_counter()
                seen.num_messages += 1
                seen.num_tokens += len(response.token_ids)
                if last_s is not None:
                    seen.gaps_s.append(now_s - last_s)
                last_s = now_s
            raise RuntimeError(f"stream {number} has ended; give it more tokens")

    readers = [asyncio.create_task(read(number)) for number in range(count)]
    try:
        yield seen
        for reader in readers:
            if reader.done():
                reader.result()
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def refusals(address: str, num_callers: int, rate: float, seconds: float) -> list[float]:
    """Seconds that each refusal took, of calls that come at ``rate`` a second over ``num_callers`` connections.

    Raises RuntimeError for a call that is not refused.
    """
    times_s: list[float] = []

    async def ask(stub: inference_pb2_grpc.InferenceServiceStub, number: int) -> None:
        began_s = time.perf_counter()
        try:
            async for _ in stub.Generate(make_request(number, 16)):  # type: ignore[attr-defined]
                raise RuntimeError("a request was taken beyond the limit")
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        times_s.append(time.perf_counter() - began_s)

    async with contextlib.AsyncExitStack() as stack:
        stubs = []
        for _ in range(num_callers):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=_OWN_CONNECTION))
            await channel.channel_ready()
            stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
        async with asyncio.TaskGroup() as calls:
            began_s = time.perf_counter()
            for number in range(round(rate * seconds)):
                await asyncio.sleep(began_s + number / rate - time.perf_counter())
                calls.create_task(ask(stubs[number % num_callers], number))
    return times_s


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)
