"""What the front door costs and how long it takes, with a stub engine behind it: streams, idle ones, refusals.

The server has one core; clients and the stub engine have the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.front_door_clients import refusals, streams, until
from shardray.runtime.client import AsyncClient
from tests.stub_replica import StubReplica

_ROOT = Path(__file__).parents[1]
_TOKENS_A_SECOND = 50.0  # of each stream
_MAX_MODEL_LEN = 32_768
_WARM_UP_S = 3.0
_IDLE_STEP_S = 3600.0
_NUM_REFUSED_CLIENTS = 16
_REFUSALS_A_SECOND = 200.0
_MAX_QUEUED = 16
TARGETS = {
    "32 streams: driver CPU a message, µs": 40.0,
    "256 streams: driver CPU a message, µs": 40.0,
    "256 streams: between two tokens, p99, ms": 40.0,
    "1000 idle streams: share of a core, %": 2.0,
    "refusals at overload: p99, ms": 10.0,
}


@dataclass(frozen=True)
class Figure:
    """One number; ``target`` None has none."""

    what: str
    value: float

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.what)


@dataclass(frozen=True)
class FrontDoorSetup:
    """What is measured, and for how long each."""

    model: str  # whose tokenizer makes text of the tokens
    seconds: float


async def measure(setup: FrontDoorSetup) -> AsyncIterator[Figure]:
    """One figure after the other. Raises ValueError if this process may use one core only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError("front-door: needs two cores, one for the server and one for its clients")
    os.sched_setaffinity(0, set(cores[1:]))
    try:
        for count in (32, 256):
            for figure in await _streams(setup, cores[0], count):
                yield figure
        yield await _idle(setup, cores[0], 1000)
        for figure in await _refused(setup, cores[0], 64):
            yield figure
    finally:
        os.sched_setaffinity(0, set(cores))


async def _streams(setup: FrontDoorSetup, core: int, count: int) -> list[Figure]:
    name = f"{count} streams"
    with _bare(core) as (address, server):
        bare = await _load(setup, address, server, count)
    with _served(setup, core, count) as (address, server):
        found = await _load(setup, address, server, count)
    return [
        Figure(f"{name}: driver CPU a message, µs", found.message_us),
        Figure(f"{name}: CPU a message of a bare gRPC server, µs", bare.message_us),
        Figure(f"{name}: between two tokens, p99, ms", 1e3 * _p99(found.gaps_s)),
        Figure(f"{name}: tokens a second of each", found.num_tokens / setup.seconds / count),
        Figure(f"{name}: share of the driver's core, %", 100 * found.cpu_s / setup.seconds),
    ]


@dataclass(frozen=True)
class _Load:
    """What a server did for some seconds."""

    num_messages: int
    num_tokens: int
    cpu_s: float
    gaps_s: list[float]

    @property
    def message_us(self) -> float:
        return 1e6 * self.cpu_s / self.num_messages


async def _load(setup: FrontDoorSetup, address: str, server: psutil.Process, count: int) -> _Load:
    async with streams(address, count, _MAX_MODEL_LEN - 64) as seen:
        await until(lambda: seen.num_messages > 2 * count, timeout_s=60)
        await asyncio.sleep(_WARM_UP_S)
        seen.gaps_s.clear()
        num_messages, num_tokens, cpu_s = seen.num_messages, seen.num_tokens, _cpu_s(server)
        await asyncio.sleep(setup.seconds)
        return _Load(
            seen.num_messages - num_messages, seen.num_tokens - num_tokens, _cpu_s(server) - cpu_s, list(seen.gaps_s)
        )


async def _idle(setup: FrontDoorSetup, core: int, count: int) -> Figure:
    """Streams of requests that an engine has taken and gives nothing for."""
    with _served(setup, core, count, step_time_s=_IDLE_STEP_S) as (address, server):
        async with streams(address, count, 64), AsyncClient(address) as client:
            async with asyncio.timeout(60):
                while (await client.fleet()).num_live_requests < count:
                    await asyncio.sleep(0.2)
            await asyncio.sleep(_WARM_UP_S)
            cpu_s = _cpu_s(server)
            await asyncio.sleep(setup.seconds)
            cpu_s = _cpu_s(server) - cpu_s
    return Figure(f"{count} idle streams: share of a core, %", 100 * cpu_s / setup.seconds)


async def _refused(setup: FrontDoorSetup, core: int, count: int) -> list[Figure]:
    """Every place is taken by a stream, and the queue is full."""
    num_waiting = count // 8 + _MAX_QUEUED  # a few more than run are handed to a replica
    with _served(setup, core, count, max_queued=_MAX_QUEUED) as (address, _):
        async with streams(address, count, _MAX_MODEL_LEN - 64) as seen:
            await until(lambda: seen.num_messages > 2 * count, timeout_s=60)
            async with streams(address, num_waiting, _MAX_MODEL_LEN - 64):
                await asyncio.sleep(_WARM_UP_S)
                seen.gaps_s.clear()
                times_s = await refusals(address, _NUM_REFUSED_CLIENTS, _REFUSALS_A_SECOND, setup.seconds)
                gaps_s = list(seen.gaps_s)
    return [
        Figure("refusals at overload: p99, ms", 1e3 * _p99(times_s)),
        Figure("refusals at overload: median, ms", 1e3 * statistics.median(times_s)),
        Figure(f"refusals at overload: between two tokens of {count} streams meanwhile, p99, ms", 1e3 * _p99(gaps_s)),
    ]


@contextlib.contextmanager
def _served(
    setup: FrontDoorSetup,
    core: int,
    max_num_seqs: int,
    step_time_s: float = 1 / _TOKENS_A_SECOND,
    max_queued: int = 2000,
) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server that is up, and its process."""
    replica = StubReplica(
        step_time_s=step_time_s, max_num_seqs=max_num_seqs, max_model_len=_MAX_MODEL_LEN, num_kv_tokens=1 << 26
    )
    command = [sys.executable, "-m", "benchmarks.front_door_server", "--model", setup.model]
    command += ["--replica", replica.address, "--core", str(core)]
    command += ["--max-num-seqs", str(max_num_seqs), "--max-queued", str(max_queued)]
    try:
        with _started(command) as started:
            yield started
    finally:
        replica.kill()


@contextlib.contextmanager
def _bare(core: int) -> Iterator[tuple[str, psutil.Process]]:
    """The same of one that does nothing but write."""
    command = [sys.executable, "-m", "benchmarks.bare_server", "--core", str(core), "--rate", str(_TOKENS_A_SECOND)]
    with _started(command) as started:
        yield started


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server that prints its port."""
    server = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"127.0.0.1:{int(server.stdout.readline())}", psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def _cpu_s(process: psutil.Process) -> float:
    times: Any = process.cpu_times()
    return float(times.user + times.system)


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def to_table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = ["| | found | at most |", "| --- | --- | --- |"]
    for figure in figures:
        target = "" if figure.target is None else f"{figure.target:g}"
        missed = figure.target is not None and figure.value > figure.target
        value = f"**{figure.value:.1f}**" if missed else f"{figure.value:.1f}"
        lines.append(f"| {figure.what} | {value} | {target} |")
    return "\n".join(lines)
