"""More requests than the fleet can run: who is admitted, who is refused, and what both are told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import grpc.aio

from shardray.runtime.client.channel import channel_options
from shardray.runtime.client.errors import to_server_error
from shardray.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.abuse.deadlines import keep_probing
from tests.abuse.worker import tell

_PROMPT = range(5, 25)


@dataclass
class Tally:
    """Of the clients that arrived."""

    began_s: float = field(default_factory=time.monotonic)
    codes: Counter[str] = field(default_factory=Counter)
    num_cut_short: int = 0  # admitted, ended well, with fewer tokens than were asked for
    first_token_s: list[tuple[float, float]] = field(default_factory=list)  # (arrival, wait)
    queue_s: list[float] = field(default_factory=list)
    retry_s: list[float] = field(default_factory=list)
    num_without_retry: int = 0


async def attack(
    address: str,
    told: asyncio.Queue[str | None],
    seconds: float,
    num_clients: int,
    max_tokens: int,
    factor: float = 4.0,
) -> dict[str, Any]:
    """Measure the capacity with ``num_clients`` at once, tell it, and send ``factor`` times as much for ``seconds``."""
    request = inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=_PROMPT),
        sampling=common_pb2.SamplingParameters(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await _capacity(stub, request, num_clients, probe_s=1.0)  # kernels are compiled, buffers made
        capacity = await _capacity(stub, request, num_clients, probe_s=min(5.0, seconds / 4))
        tell({"capacity_per_s": capacity})
        tally = Tally()
        deadlines = asyncio.create_task(keep_probing(address, until_s=tally.began_s + seconds))
        await _arrive(stub, request, factor * capacity, seconds, tally)
        return {"capacity_per_s": round(capacity, 1), **_figures(tally, seconds), "deadlines": await deadlines}


async def _capacity(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    request: inference_pb2.GenerateRequest,
    num_clients: int,
    probe_s: float,
) -> float:
    """Requests a second that are answered with every place taken."""
    began_s, num_done = time.monotonic(), 0

    async def ask() -> None:
        nonlocal num_done
        while time.monotonic() < began_s + probe_s:
            async for _ in stub.Generate(request):
                pass
            num_done += 1

    await asyncio.gather(*(ask() for _ in range(num_clients)))
    return num_done / (time.monotonic() - began_s)


async def _arrive(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    request: inference_pb2.GenerateRequest,
    rate: float,
    seconds: float,
    tally: Tally,
) -> None:
    """One client after the other, at a steady rate, whatever becomes of those before."""
    async with asyncio.TaskGroup() as clients:
        for number in range(round(rate * seconds)):
            await asyncio.sleep(tally.began_s + number / rate - time.monotonic())
            clients.create_task(_ask(stub, request, tally))


async def _ask(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, request: inference_pb2.GenerateRequest, tally: Tally
) -> None:
    arrived_s, num_tokens = time.monotonic(), 0
    try:
        async for response in stub.Generate(request):
            if not num_tokens:
                tally.first_token_s.append((arrived_s - tally.began_s, time.monotonic() - arrived_s))
            num_tokens += len(response.token_ids)
            if response.HasField("timing"):
                tally.queue_s.append(response.timing.queue_s)
    except grpc.aio.AioRpcError as error:
        failure = to_server_error(error, "")
        tally.codes[failure.code] += 1
        if failure.retry_after_s is None:
            tally.num_without_retry += 1
        else:
            tally.retry_s.append(failure.retry_after_s)
        return
    tally.codes["OK"] += 1
    tally.num_cut_short += num_tokens != request.sampling.max_tokens


def _figures(tally: Tally, seconds: float) -> dict[str, Any]:
    waits_s = [_in_quarter(number, seconds, tally.first_token_s) for number in (1, 3)]
    return {
        "arrived": tally.codes.total(),
        "admitted": tally.codes["OK"],
        "refused": tally.codes["RESOURCE_EXHAUSTED"],
        "other": {code: n for code, n in tally.codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED")},
        "cut_short": tally.num_cut_short,
        "without_retry": tally.num_without_retry,
        "retry_s": [round(f(tally.retry_s or [0.0]), 2) for f in (min, median, max)],
        "queue_s": [round(f(tally.queue_s or [0.0]), 2) for f in (min, median, max)],
        "first_token_s": [round(median(waits or [0.0]), 3) for waits in waits_s],  # in the 2nd and the last quarter
    }


def _in_quarter(number: int, seconds: float, values: list[tuple[float, float]]) -> list[float]:
    """Those of (time, value) in one quarter of the load."""
    return [value for time_s, value in values if number <= 4 * time_s / seconds < number + 1]
