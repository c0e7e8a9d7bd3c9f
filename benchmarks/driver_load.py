"""What the driver costs for each token, against the number of streams and of replicas. The replicas have no model.

Together the streams get about the same number of tokens a second, however many they are: steps are that much longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks import processes
from benchmarks.machine import BUSY_CORES, OthersMeter
from shardray.runtime.client import AsyncClient

Record = dict[str, Any]
NUM_STREAMS = (1, 8, 64, 256, 1000, 2000)  # with one replica
NUM_REPLICAS = (1, 2, 4, 8)
STREAMS_OF_REPLICAS = 256  # in all of them together
_TOKENS_PER_S = 2000.0
_MIN_STEP_S = 0.005
_MAX_TOKENS = 400
_PROMPT = tuple(range(10, 30))


async def measure(window_s: float) -> AsyncIterator[Record]:
    """A record for each point, of ``window_s`` seconds once every stream runs."""
    points = [(num_streams, 1) for num_streams in NUM_STREAMS]
    points += [(STREAMS_OF_REPLICAS, num_replicas) for num_replicas in NUM_REPLICAS[1:]]
    for num_streams, num_replicas in points:
        yield await measure_point(num_streams, num_replicas, window_s)


async def measure_point(num_streams: int, num_replicas: int, window_s: float) -> Record:
    step_s = max(_MIN_STEP_S, num_streams / _TOKENS_PER_S)
    async with _stub_fleet(num_replicas, -(-num_streams // num_replicas), step_s) as (address, pid):
        async with AsyncClient(address, timeout_s=600) as client:
            counts = [0] * num_streams
            streams = [asyncio.create_task(_read(client, counts, index)) for index in range(num_streams)]
            try:
                await _until_all_run(counts, streams)
                figures = await _watch(pid, counts, window_s)
            finally:
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)
    return {"kind": "driver", "num_streams": num_streams, "num_replicas": num_replicas, "step_s": step_s, **figures}


async def _watch(pid: int, counts: list[int], window_s: float) -> Record:
    meter, began_s, cpu_s, num_tokens = OthersMeter(), time.perf_counter(), processes.cpu_seconds([pid]), sum(counts)
    await asyncio.sleep(window_s)
    took_s, got = time.perf_counter() - began_s, sum(counts) - num_tokens
    driver_s = processes.cpu_seconds([pid]) - cpu_s
    return {
        "tokens_per_s": got / took_s,
        "driver_cores": driver_s / took_s,
        "driver_cpu_s_per_token": driver_s / max(1, got),
        "busy": meter.cores() > BUSY_CORES,
    }


async def _read(client: AsyncClient, counts: list[int], index: int) -> None:
    while True:
        async for delta in client.stream(_PROMPT, max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True):
            counts[index] += len(delta.token_ids)


async def _until_all_run(counts: list[int], streams: list[asyncio.Task[None]]) -> None:
    while not all(counts):
        for stream in streams:
            if stream.done():
                stream.result()
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _stub_fleet(num_replicas: int, max_num_seqs: int, step_s: float) -> AsyncIterator[tuple[str, int]]:
    words = [str(num_replicas), str(max_num_seqs), str(step_s)]
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.stub_fleet", *words,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        line = (await server.stdout.readline()).decode()
        if not line.startswith("address "):
            raise RuntimeError("the stub fleet ended before it served")
        yield line.split()[1], server.pid
    finally:
        server.stdin.close()
        await server.wait()


def to_table(records: list[Record]) -> str:
    """Markdown."""
    lines = ["| streams | replicas | tokens/s | driver, cores | driver, µs a token |", "| ---: |" + " ---: |" * 4]
    for one in records:
        cells = f"{one['tokens_per_s']:.0f} | {one['driver_cores']:.2f} | {1e6 * one['driver_cpu_s_per_token']:.0f}"
        lines.append(f"| {one['num_streams']} | {one['num_replicas']} | {cells} |")
    return "\n".join(lines)
