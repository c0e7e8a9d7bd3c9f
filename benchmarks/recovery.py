"""From ``kill -9`` of a host to the next token at the client, and where the time goes.

One stream runs on two tensor ranks. The non-leader and the leader are killed in turn.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.live_fleet import EndlessStream, serving
from shardray.runtime.client import AsyncClient
from shardray.v1 import control_pb2

TARGETS_S = {0: 5.0, 1: 1.5}  # by number of spares, on the demo model
_TOKENS_BEFORE = 30  # of the stream, before its host is killed
_ROUND_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Recovery:
    """One kill, in seconds: the parts follow each other, and ``total_s`` is their sum."""

    victim: str
    detect_s: float  # until the driver saw the first sign
    fence_s: float  # until the other rank had left the mesh
    hosts_s: float  # until there was a host for every place: a warm spare, or a new process
    form_s: float  # until the process groups were open
    load_s: float  # until all weights were loaded
    attach_s: float  # until the driver was connected
    replay_s: float  # until the client had the next token: prompt and tokens so far are prefilled again
    total_s: float


@dataclass(frozen=True)
class RecoverySetup:
    """What is measured."""

    model: str
    dtype: str
    num_spares: int
    num_rounds: int
    num_threads: int  # of each host
    peace_s: float  # in which nothing fails before a kill; a fleet that is hit again within 5 s takes its time


async def measure(setup: RecoverySetup) -> AsyncIterator[Recovery]:
    """One result a round."""
    async with serving(_settings(setup)) as (address, events), AsyncClient(address) as client:
        for number in range(setup.num_rounds):
            shards = await _whole_fleet(client)
            await asyncio.sleep(setup.peace_s)
            stream = EndlessStream(client)
            try:
                async with asyncio.timeout(_ROUND_TIMEOUT_S):
                    await stream.until(_TOKENS_BEFORE)
                    yield await _kill(shards, (number + 1) % 2, stream, events["recovered"])
            finally:
                await stream.close()


async def _kill(
    shards: Sequence[control_pb2.Shard], rank: int, stream: EndlessStream, recovered: asyncio.Queue[dict[str, Any]]
) -> Recovery:
    num_before, killed_s = len(stream.arrivals_s), time.time()
    os.kill(shards[rank].pid, signal.SIGKILL)
    times = await recovered.get()
    parts = {name: float(times[name]) for name in ("fence_s", "hosts_s", "form_s", "load_s", "attach_s")}
    await stream.until(num_before + 10)  # some may have been on their way
    next_token_s = stream.end_of_pause(killed_s)
    return Recovery(
        victim="leader" if rank == 0 else f"rank {rank}",
        detect_s=times["noticed_s"] - killed_s,
        replay_s=next_token_s - times["noticed_s"] - sum(parts.values()),
        total_s=next_token_s - killed_s,
        **parts,
    )


async def _whole_fleet(client: AsyncClient) -> list[control_pb2.Shard]:
    """The shards of the only replica, by rank, once it runs and its spares are ready."""
    while True:
        fleet = await client.fleet()
        ready = all(replica.state == control_pb2.FLEET_STATE_READY for replica in fleet.replicas)
        if ready and fleet.num_ready_spares >= fleet.num_wanted_spares:
            return list(fleet.replicas[0].shards)
        await asyncio.sleep(0.1)


def _settings(setup: RecoverySetup) -> dict[str, Any]:
    return {
        "model.source": setup.model,
        "model.dtype": setup.dtype,
        "parallel.tensor_parallel_size": 2,
        "engine.threads_per_host": setup.num_threads,
        "cluster.spares": setup.num_spares,
    }


def to_table(recoveries: Sequence[Recovery], num_spares: int) -> str:
    """Markdown: a row for each kill, then median and worst, then how that compares with the target."""
    names = [field.name for field in fields(Recovery) if field.name != "victim"]
    rows = [(f"{number} {one.victim}", asdict(one)) for number, one in enumerate(recoveries, 1)]
    for label, choose in (("median", statistics.median), ("worst", max)):
        rows.append((label, {name: choose(getattr(one, name) for one in recoveries) for name in names}))
    lines = [
        "| killed | " + " | ".join(name.removesuffix("_s") for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
        *(f"| {label} | " + " | ".join(f"{times[name]:.2f}" for name in names) + " |" for label, times in rows),
    ]
    median_s, target_s = rows[-2][1]["total_s"], TARGETS_S.get(num_spares, TARGETS_S[1])
    verdict = "met" if median_s < target_s else "missed"
    spares = "1 spare" if num_spares == 1 else f"{num_spares} spares"
    return "\n".join([*lines, "", f"Seconds. Target: below {target_s:g} s with {spares}, median; {verdict}."])
