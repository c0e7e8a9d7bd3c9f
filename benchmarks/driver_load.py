"""What the driver costs for each token, against the number of streams and of replicas. The replicas have no model.

Together the streams get about the same number of tokens a second, however many they are: steps are that much longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from benchmarks import processes
from benchmarks.machine import BUSY_CORES, OthersMeter
from benchmarks.stub_clients import MAX_STREAMS

Record = dict[str, Any]
NUM_STREAMS = (1, 8, 64, 256, 1000, 2000)  # with one replica
NUM_REPLICAS = (1, 2, 4, 8)
STREAMS_OF_REPLICAS = 256  # in all of them together
_TOKENS_PER_S = 2000.0
_MIN_STEP_S = 0.005
_START_TIMEOUT_S = 60.0


async def measure(window_s: float) -> AsyncIterator[Record]:
    """A record for each point, of ``window_s`` seconds once every stream runs."""
    points = [(num_streams, 1) for num_streams in NUM_STREAMS]
    points += [(STREAMS_OF_REPLICAS, num_replicas) for num_replicas in NUM_REPLICAS[1:]]
    for num_streams, num_replicas in points:
        yield await measure_point(num_streams, num_replicas, window_s)


async def measure_point(num_streams: int, num_replicas: int, window_s: float) -> Record:
    """Raises RuntimeError for a part that ended, TimeoutError if not every stream gets tokens."""
    step_s = max(_MIN_STEP_S, num_streams / _TOKENS_PER_S)
    places = -(-num_streams // num_replicas)
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(_started("stub_fleet", num_replicas, places, step_s))
        address = (await _line(fleet)).split()[1]
        clients = []
        for first in range(0, num_streams, MAX_STREAMS):
            own = min(MAX_STREAMS, num_streams - first)
            clients.append(await stack.enter_async_context(_started("stub_clients", address, own)))
        async with asyncio.timeout(_START_TIMEOUT_S):
            while sum([(await _tally(client))[2] for client in clients]) < num_streams:
                pass
        figures = await _watch(fleet.pid, clients, window_s)
    return {"kind": "driver", "num_streams": num_streams, "num_replicas": num_replicas, "step_s": step_s, **figures}


async def _watch(pid: int, clients: list[asyncio.subprocess.Process], window_s: float) -> Record:
    """``driver_cores`` is of the process of driver and server."""
    meter, cpu_s = OthersMeter(), processes.cpu_seconds([pid])
    before = [await _tally(client) for client in clients]
    after = before
    while after[0][0] - before[0][0] < window_s:  # each process tells several times a second
        after = [await _tally(client) for client in clients]
    driver_s, took_s = processes.cpu_seconds([pid]) - cpu_s, after[0][0] - before[0][0]
    num_tokens = sum(late[1] - early[1] for early, late in zip(before, after, strict=True))
    return {
        "tokens_per_s": num_tokens / took_s,
        "driver_cores": driver_s / took_s,
        "driver_cpu_s_per_token": driver_s / max(1.0, num_tokens),
        "busy": meter.cores() > BUSY_CORES,
    }


async def _tally(client: asyncio.subprocess.Process) -> tuple[float, float, float]:
    """When, tokens so far, streams that have had some."""
    when_s, num_tokens, num_streams = map(float, (await _line(client)).split())
    return when_s, num_tokens, num_streams


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    if not (line := await process.stdout.readline()):
        raise RuntimeError(f"a part of the driver's benchmark ended with code {await process.wait()}")
    return line.decode()


@contextlib.asynccontextmanager
async def _started(module: str, *words: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A module of the benchmarks in a process that ends when its input does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"benchmarks.{module}", *map(str, words),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        await process.communicate()


def to_table(records: list[Record]) -> str:
    """Markdown."""
    lines = ["| streams | replicas | tokens/s | driver, cores | driver, µs a token |", "| ---: |" + " ---: |" * 4]
    for one in records:
        cells = f"{one['tokens_per_s']:.0f} | {one['driver_cores']:.2f} | {1e6 * one['driver_cpu_s_per_token']:.0f}"
        lines.append(f"| {one['num_streams']} | {one['num_replicas']} | {cells} |")
    return "\n".join(lines)
