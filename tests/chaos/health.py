"""What the fleet says of itself during a chaos run: who is who, how long recoveries take, what is left at the end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from shardray.runtime.client import AsyncClient, ServerError
from shardray.v1 import control_pb2
from tests.chaos.report import Report

_WATCH_INTERVAL_S = 0.02
_SETTLE_TIMEOUT_S = 60.0
_POLL_S = 0.2


class FleetView:
    """The latest snapshot of the fleet, and the clock of its recoveries."""

    def __init__(self, client: AsyncClient, report: Report) -> None:
        self._client = client
        self._report = report
        self._fleet = control_pb2.Fleet()
        self._hits: dict[int, _Hit] = {}  # by replica id
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def is_leader(self, pid: int) -> bool:
        return any(shard.pid == pid and shard.rank == 0 for _, shard in self._shards())

    def is_shard(self, pid: int) -> bool:
        return any(shard.pid == pid for _, shard in self._shards())

    def describe(self, pid: int) -> str:
        """Who a process is to the fleet, and what that is at."""
        for replica, shard in self._shards():
            if shard.pid == pid:
                return f"pid {pid} (replica {replica.replica_id} rank {shard.rank}, {_state(replica)})"
        states = ", ".join(_state(replica) for replica in self._fleet.replicas)
        return f"pid {pid} (in no mesh; replicas {states})"

    def note_fault(self, pid: int, cause: str) -> None:
        """A process is being hit; if it serves, its replica's recovery begins."""
        for replica, shard in self._shards():
            if shard.pid == pid and replica.state == control_pb2.FLEET_STATE_READY:
                hit = self._hits.setdefault(replica.replica_id, _Hit(cause, self._report.faults.total()))
                hit.pids.add(pid)

    async def settle(self) -> None:
        """Until the fleet is whole and holds nothing of any request. What is missing in the end is a problem."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (missing := _missing(await self._client.fleet())) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        for what in missing:
            self._report.problem(f"{_SETTLE_TIMEOUT_S:g} s after the last stream: {what}")

    async def _watch(self) -> None:
        while True:
            try:
                async for fleet in self._client.watch_fleet(_WATCH_INTERVAL_S):
                    self._fleet = fleet
                    self._time_recoveries()
            except ServerError as error:
                self._report.problem(f"the watch of the fleet ended: {error}")
                await asyncio.sleep(_POLL_S)

    def _time_recoveries(self) -> None:
        for replica_id, hit in list(self._hits.items()):
            replica = next((one for one in self._fleet.replicas if one.replica_id == replica_id), None)
            if replica is None:  # removed meanwhile
                del self._hits[replica_id]
            elif replica.state == control_pb2.FLEET_STATE_READY and not hit.pids & {
                shard.pid for shard in replica.shards
            }:
                del self._hits[replica_id]
                was_alone = self._report.faults.total() == hit.num_faults_before + 1
                took_s = time.monotonic() - hit.time_s
                self._report.recovery(replica_id, hit.cause if was_alone else "faults one after the other", took_s)

    def _shards(self) -> list[tuple[control_pb2.Replica, control_pb2.Shard]]:
        return [(replica, shard) for replica in self._fleet.replicas for shard in replica.shards]


@dataclass
class _Hit:
    """A replica that was hit while it served."""

    cause: str
    num_faults_before: int
    pids: set[int] = field(default_factory=set)
    time_s: float = field(default_factory=time.monotonic)


def _missing(fleet: control_pb2.Fleet) -> list[str]:
    """What a fleet that has nothing to do should not show."""
    found = []
    for replica in fleet.replicas:
        stats = replica.stats
        held = (stats.num_running, stats.num_waiting, stats.num_used_pages, replica.num_live_requests)
        if replica.state != control_pb2.FLEET_STATE_READY:
            found.append(f"replica {replica.replica_id} is {_state(replica)}: {replica.reason}")
        elif any(held):
            words = zip(held, ("running", "waiting", "pages", "live"), strict=True)
            found.append(f"replica {replica.replica_id}: {', '.join(f'{count} {word}' for count, word in words)}")
    if fleet.num_queued_requests or fleet.num_live_requests:
        found.append(f"{fleet.num_queued_requests} requests queued, {fleet.num_live_requests} live")
    if fleet.num_ready_spares != fleet.num_wanted_spares:
        found.append(f"{fleet.num_ready_spares} of {fleet.num_wanted_spares} spares")
    return found


def _state(replica: control_pb2.Replica) -> str:
    return control_pb2.FleetState.Name(replica.state).removeprefix("FLEET_STATE_").lower()
