"""An operator whose replicas are stubs: it attaches and detaches real processes, step by step, and can be held up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from shardray.parallel.spans import Span, SpanKind
from shardray.runtime.cluster.trace import RankTrace
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.operation_run import OperationRun, Say
from shardray.runtime.driver.operations import (
    OperationConflictError,
    OperationFailedError,
    OperationKind,
    OperationProgress,
    OperationRefusedError,
    ShapeChange,
)
from tests.serving import SHARD
from tests.stub_replica import SECRET, StubReplica

MAX_REPLICAS = 4
STEP_TIME_S = 0.01


class StubOperator:
    def __init__(self, driver: Driver) -> None:
        self.asked: list[object] = []
        self.may_go_on = asyncio.Event()  # cleared: an operation waits after its first step
        self.may_go_on.set()
        self.fails_with: str | None = None  # half-way
        self.drained = asyncio.Event()
        self._driver = driver
        self._added: dict[int, StubReplica] = {}
        self._operation: OperationRun | None = None

    def scale(self, change: ShapeChange) -> AsyncIterator[OperationProgress]:
        return self._alone(OperationKind.SCALE, change, lambda say: self._scale(change, say))

    def reload(self, source: str) -> AsyncIterator[OperationProgress]:
        return self._alone(OperationKind.RELOAD, source, lambda say: self._replace(f"loading {source}", say))

    def restart(self) -> AsyncIterator[OperationProgress]:
        return self._alone(OperationKind.RESTART, "restart", lambda say: self._replace("starting new hosts", say))

    def drain(self, timeout_s: float) -> AsyncIterator[OperationProgress]:
        return self._alone(OperationKind.DRAIN, timeout_s, lambda say: self._drain(timeout_s, say))

    async def trace(self, seconds: float) -> list[RankTrace]:
        self.asked.append(seconds)
        spans = [Span(SpanKind.STEP, f"step {i}: 1 decodes", 1_000_000 * i, 900_000) for i in range(30_000)]
        return [
            RankTrace(replica_id=0, rank=rank, stage=0, tp_rank=rank, host="here", pid=rank + 1, spans=found)
            for rank, found in enumerate((spans, []))
        ]

    def kill_added(self) -> None:
        for replica in self._added.values():
            replica.kill()

    async def _alone(
        self, kind: OperationKind, asked: object, work: Callable[[Say], Awaitable[None]]
    ) -> AsyncIterator[OperationProgress]:
        self.asked.append(asked)
        if self._operation is not None and self._operation.is_under_way:
            raise OperationConflictError("another operation is under way; wait for its end")
        self._operation = OperationRun(kind, self._driver.fleet, work)
        async for step in self._operation.steps():
            yield step

    async def _scale(self, change: ShapeChange, say: Say) -> None:
        ready = self._driver.fleet.ready_replicas()
        wanted = change.replicas or len(ready)
        if wanted > MAX_REPLICAS:
            raise OperationRefusedError(f"{wanted} replicas need {wanted} hosts, but there are {MAX_REPLICAS}")
        say(f"from {len(ready)} to {wanted} replicas", 0.0)
        await self._half_way()
        for replica_id in range(len(ready), wanted):
            await self._attach(replica_id, change.tensor_parallel_size or 1)
            say(f"replica {replica_id} serves", (replica_id + 1) / wanted)
        for replica_id in range(wanted, len(ready)):
            await self._remove(replica_id)

    async def _replace(self, doing: str, say: Say) -> None:
        say(doing, 0.0)
        await self._half_way()
        for replica in self._driver.fleet.ready_replicas():
            await self._attach(replica.replica_id, 1)

    async def _drain(self, timeout_s: float, say: Say) -> None:
        say(f"{self._driver.fleet.snapshot().num_live_requests} requests in flight", 0.0)
        await self._driver.shutdown(timeout_s)
        self.drained.set()

    async def _half_way(self) -> None:
        await self.may_go_on.wait()
        if self.fails_with is not None:
            raise OperationFailedError(self.fails_with)

    async def _attach(self, replica_id: int, tp_size: int) -> None:
        """Another process takes over from the one that has this id, if there is one."""
        replica = await asyncio.to_thread(StubReplica, step_time_s=STEP_TIME_S)
        shards = [msgspec.structs.replace(SHARD, rank=rank, tp_rank=rank) for rank in range(tp_size)]
        await self._driver.attach(replica_id, replica.address, SECRET, shards)
        self._kill(replica_id)
        self._added[replica_id] = replica

    async def _remove(self, replica_id: int) -> None:
        await self._driver.retire(replica_id)
        self._kill(replica_id)

    def _kill(self, replica_id: int) -> None:
        if (replica := self._added.pop(replica_id, None)) is not None:
            replica.kill()
