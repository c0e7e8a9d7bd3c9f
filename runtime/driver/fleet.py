"""The state of the fleet: its replicas, what they do and why, and a watch that tells of every change."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from shardray.runtime.cluster.reports import RankFailure
from shardray.runtime.driver.operations import OperationStatus
from shardray.runtime.engine.assignment import ShardInfo, ShardLoad
from shardray.runtime.engine.request import EngineStats

_NO_STATS = EngineStats()


class FleetState(enum.StrEnum):
    """Of a replica, or of the whole fleet."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"
    RECOVERING = "recovering"  # formed again, after a loss or in another shape; its requests wait


# The first of these that any replica is in is the state of the fleet.
_MOST_TELLING = (FleetState.READY, FleetState.RECOVERING, FleetState.LOADING, FleetState.STOPPING, FleetState.FAILED)


@dataclasses.dataclass(frozen=True)
class ReplicaStatus:
    """One replica, at one moment."""

    replica_id: int
    state: FleetState = FleetState.LOADING
    reason: str = ""  # why it failed or stops, or which step of loading or of a recovery it is at
    progress: float = 0.0  # of loading or of the recovery, in [0, 1]
    shards: tuple[ShardInfo, ...] = ()
    loads: tuple[ShardLoad | None, ...] = ()  # by rank; None: not heard of yet
    stats: EngineStats = _NO_STATS
    num_live_requests: int = 0  # dispatched and not ended
    num_live_sequences: int = 0  # the same, each with its beams
    output_tokens_per_s: float = 0.0
    state_time_s: float = 0.0  # when it entered its state, in seconds since 1970
    num_recoveries: int = 0  # times that it was ready again after a failure
    last_failure: RankFailure | None = None
    last_failure_s: float = 0.0  # when that was noticed, in seconds since 1970

    def load_of(self, shard: ShardInfo) -> ShardLoad | None:
        """What a shard told last; None before it has."""
        return self.loads[shard.rank] if shard.rank < len(self.loads) else None


@dataclasses.dataclass(frozen=True)
class FleetStatus:
    """The fleet, at one moment."""

    model_id: str
    state: FleetState
    reason: str
    replicas: tuple[ReplicaStatus, ...]
    num_queued_requests: int
    num_live_requests: int
    start_time_s: float
    num_ready_spares: int = 0
    num_wanted_spares: int = 0
    operation: OperationStatus | None = None  # that is under way
    ended_operations: tuple[tuple[str, str, int], ...] = ()  # that ended: ("scale", "ok", how many)

    @property
    def takes_requests(self) -> bool:
        return self.state in (FleetState.READY, FleetState.RECOVERING)


class Fleet:
    """Replicas by id. Use it in one asyncio loop."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self._replicas: dict[int, ReplicaStatus] = {}
        self._stats_times: dict[int, float] = {}
        self._broken: set[int] = set()  # failed since they were ready last
        self._stop_reason: str | None = None
        self._num_queued = 0
        self._num_live = 0
        self._num_ready_spares = 0
        self._num_wanted_spares = 0
        self._operation: OperationStatus | None = None
        self._start_time_s = time.time()
        self._operations: Counter[tuple[str, str]] = Counter()
        self._watchers: set[asyncio.Event] = set()
        self._closed = asyncio.Event()

    def set_loading(self, replica_id: int, step: str = "", progress: float = 0.0) -> None:
        """A replica is being formed: ``step`` in a few words, ``progress`` in [0, 1]."""
        self._enter(replica_id, FleetState.LOADING, step, progress=progress)

    def set_ready(self, replica_id: int, shards: Sequence[ShardInfo]) -> None:
        """It serves on these shards, whose engine counts from 0."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.rank))
        self._stats_times.pop(replica_id, None)
        changes = {"progress": 1.0, "shards": ordered, "stats": _NO_STATS, "output_tokens_per_s": 0.0}
        if (replica := self._replicas.get(replica_id)) is not None:
            changes["loads"] = replica.loads[: len(ordered)]
        self._enter(replica_id, FleetState.READY, "", **changes)
        if replica_id in self._broken:
            self._broken.discard(replica_id)
            self._update(replica_id, num_recoveries=self._replicas[replica_id].num_recoveries + 1)

    def set_failed(self, replica_id: int, reason: str) -> None:
        self._enter(replica_id, FleetState.FAILED, reason, output_tokens_per_s=0.0)

    def set_recovering(self, replica_id: int, step: str = "", progress: float = 0.0) -> None:
        """A replica is formed again, its requests wait: ``step`` in a few words, ``progress`` in [0, 1]."""
        self._enter(replica_id, FleetState.RECOVERING, step, progress=progress, output_tokens_per_s=0.0)

    def set_failure(self, replica_id: int, failure: RankFailure) -> None:
        """Keep the latest failure of a replica; when it is ready next, that was a recovery."""
        if replica_id in self._replicas:
            self._broken.add(replica_id)
            self._update(replica_id, last_failure=failure, last_failure_s=time.time())

    def set_spares(self, num_ready: int, num_wanted: int) -> None:
        """Hosts that wait to take the place of one that is lost, and how many should."""
        self._num_ready_spares, self._num_wanted_spares = num_ready, num_wanted
        self._notify()

    def set_operation(self, operation: OperationStatus | None) -> None:
        """What is being done to the fleet, and how far it is; None once that has ended."""
        self._operation = operation
        self._notify()

    def count_operation(self, name: str, outcome: str) -> None:
        """An operation on the fleet has ended: ok, refused, failed or cancelled."""
        self._operations[name, outcome] += 1
        self._notify()

    def remove(self, replica_id: int) -> None:
        """Forget a replica that will not come back."""
        self._replicas.pop(replica_id, None)
        self._stats_times.pop(replica_id, None)
        self._broken.discard(replica_id)
        self._notify()

    def stop(self, reason: str) -> None:
        """The whole fleet takes no more requests."""
        self._stop_reason = reason
        self._notify()

    def close(self) -> None:
        """End every watch, after one last snapshot."""
        self._closed.set()
        self._notify()

    def set_stats(self, replica_id: int, stats: EngineStats) -> None:
        """Keep a replica's latest snapshot; the output rate is that between two snapshots."""
        if replica_id not in self._replicas:
            return
        now = time.monotonic()
        previous = self._replicas[replica_id].stats
        elapsed_s = now - self._stats_times.get(replica_id, now)
        self._stats_times[replica_id] = now
        num_new = stats.num_output_tokens - previous.num_output_tokens
        rate = num_new / elapsed_s if elapsed_s > 0 and (stats.num_running or stats.num_waiting) else 0.0
        self._update(replica_id, stats=stats, output_tokens_per_s=rate)

    def set_load(self, replica_id: int, rank: int, load: ShardLoad) -> None:
        """Keep what one shard of a replica told last."""
        if (replica := self._replicas.get(replica_id)) is not None:
            loads = list(replica.loads) + [None] * (rank + 1 - len(replica.loads))
            loads[rank] = load
            self._update(replica_id, loads=tuple(loads))

    def add_live(self, replica_id: int, change: int, num_beams: int = 1) -> None:
        """Count requests that were dispatched (+1) or have ended (−1)."""
        if (replica := self._replicas.get(replica_id)) is not None:
            num_sequences = replica.num_live_sequences + change * num_beams
            num_requests = replica.num_live_requests + change
            self._update(replica_id, num_live_requests=num_requests, num_live_sequences=num_sequences)

    def set_requests(self, num_queued: int, num_live: int) -> None:
        self._num_queued, self._num_live = num_queued, num_live
        self._notify()

    def ready_replicas(self) -> list[ReplicaStatus]:
        return [replica for replica in self._replicas.values() if replica.state is FleetState.READY]

    def state_of(self, replica_id: int) -> FleetState | None:
        """None: there is no such replica."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.state

    @property
    def takes_requests(self) -> bool:
        """Whether a replica runs requests, or will in a moment."""
        states = {replica.state for replica in self._replicas.values()}
        return bool(states & {FleetState.READY, FleetState.RECOVERING})

    @property
    def has_hope(self) -> bool:
        """Whether any replica is not given up."""
        return any(replica.state is not FleetState.FAILED for replica in self._replicas.values())

    def snapshot(self) -> FleetStatus:
        state, reason = self._summary()
        return FleetStatus(
            model_id=self.model_id,
            state=state,
            reason=reason,
            replicas=tuple(self._replicas[replica_id] for replica_id in sorted(self._replicas)),
            num_queued_requests=self._num_queued,
            num_live_requests=self._num_live,
            start_time_s=self._start_time_s,
            num_ready_spares=self._num_ready_spares,
            num_wanted_spares=self._num_wanted_spares,
            operation=self._operation,
            ended_operations=tuple((*key, count) for key, count in self._operations.items()),
        )

    async def watch(self, min_interval_s: float = 0.0) -> AsyncIterator[FleetStatus]:
        """The fleet now and after every change; faster ones than ``min_interval_s`` are merged. Ends on close."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield self.snapshot()
                if self._closed.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min_interval_s):
                        await self._closed.wait()
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _summary(self) -> tuple[FleetState, str]:
        replicas = [self._replicas[replica_id] for replica_id in sorted(self._replicas)]
        if self._stop_reason is not None:
            return FleetState.STOPPING, self._stop_reason
        for state in _MOST_TELLING:
            reasons = [
                f"replica {replica.replica_id}: {replica.reason}" for replica in replicas if replica.state is state
            ]
            if reasons:
                return state, "" if state is FleetState.READY else "; ".join(reasons)
        return FleetState.LOADING, "no replica has been placed yet"

    def _enter(self, replica_id: int, state: FleetState, reason: str, **changes: Any) -> None:
        replica = self._replicas.setdefault(replica_id, ReplicaStatus(replica_id))
        if replica.state is not state or replica.state_time_s == 0.0:
            changes["state_time_s"] = time.time()
        self._update(replica_id, state=state, reason=reason, **changes)

    def _update(self, replica_id: int, **changes: Any) -> None:
        self._replicas[replica_id] = dataclasses.replace(self._replicas[replica_id], **changes)
        self._notify()

    def _notify(self) -> None:
        for changed in self._watchers:
            changed.set()
