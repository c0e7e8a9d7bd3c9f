"""Joins the driver to the replicas, and changes the fleet as an operator asks: one operation at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from pydantic import ValidationError

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.events import (
    ClusterEvent,
    EventSink,
    PlacementWaiting,
    ReplicaGaveUp,
    ReplicaLost,
    ShardMeasured,
    ShardProgress,
)
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe
from shardray.runtime.cluster.replica import Replica
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.cluster.trace import RankTrace, trace_meshes
from shardray.runtime.config import Config, ParallelSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.fit import check_room, load_recipe
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.driver.operation_run import OperationRun, Say
from shardray.runtime.driver.operations import (
    OperationConflictError,
    OperationFailedError,
    OperationKind,
    OperationProgress,
    OperationRefusedError,
    ShapeChange,
)

_log = logging.getLogger(__name__)
_DRAIN_LOOK_S = 2.0  # between two counts of the requests that are left
_TRIES_TO_GO_BACK = 3  # of forming replicas that were removed, if something goes wrong then as well


class FleetController:
    """The outlet of the replicas, and the FleetOperator of the control service."""

    def __init__(self, config: Config, driver: Driver, on_event: EventSink) -> None:
        self._config = config
        self._driver = driver
        self._on_event = on_event
        self._replicas: ReplicaSet | None = None
        self._operation: OperationRun | None = None
        self._traces = False  # whether a trace is being taken
        self.stop_asked = asyncio.Event()  # by Drain

    async def start(self, model_dir: Path) -> None:
        """Form the fleet. Raises ClusterError or ConnectionError, with nothing left behind."""
        self._driver.on_link_lost = self._on_link_lost
        self._set_spares(0)
        self._replicas = await ReplicaSet.start(self._config, model_dir, self, self._on_cluster, self._set_spares)

    async def stop(self) -> None:
        """Break off the operation at hand and stop every replica. Idempotent."""
        if self._operation is not None:
            await self._operation.cancel()
        if self._replicas is not None:
            await self._replicas.stop()

    # The outlet of the replicas.

    async def up(self, replica_id: int, mesh: FormedMesh) -> None:
        await self._driver.attach(replica_id, mesh.address, mesh.credentials, mesh.shards)

    def down(self, replica_id: int, reason: str, failed: bool) -> None:
        self._driver.suspend(replica_id, reason, failed)

    # The operator's side.

    def scale(self, change: ShapeChange) -> AsyncIterator[OperationProgress]:
        return self._run(OperationKind.SCALE, lambda say: self._scale(change, say))

    def reload(self, source: str) -> AsyncIterator[OperationProgress]:
        return self._run(OperationKind.RELOAD, lambda say: self._reload(source, say))

    def restart(self) -> AsyncIterator[OperationProgress]:
        return self._run(OperationKind.RESTART, lambda say: self._reshape_all(self._fleet.recipe, say))

    def drain(self, timeout_s: float) -> AsyncIterator[OperationProgress]:
        return self._run(OperationKind.DRAIN, lambda say: self._drain(timeout_s, say))

    async def trace(self, seconds: float) -> list[RankTrace]:
        meshes = [(one.replica_id, one.mesh) for one in self._fleet.replicas if one.mesh is not None]
        if not meshes:
            raise OperationRefusedError("no replica runs; try again when one does")
        if self._traces:
            raise OperationConflictError("another trace is being taken; try again when it has ended")
        self._traces = True
        try:
            return await trace_meshes(meshes, seconds)
        finally:
            self._traces = False

    async def _run(
        self, kind: OperationKind, work: Callable[[Say], Awaitable[None]]
    ) -> AsyncIterator[OperationProgress]:
        """Start an operation and tell of its steps; it goes on when nobody listens."""
        if (other := self._operation) is not None and other.is_under_way:
            reason = f"another operation is under way ({other.kind}: {other.doing}); try again when it has ended"
            raise OperationConflictError(reason)
        self._operation = OperationRun(kind, self._driver.fleet, work)
        async for step in self._operation.steps():
            yield step

    async def _scale(self, change: ShapeChange, say: Say) -> None:
        fleet, before = self._fleet, self._fleet.recipe
        recipe, num_replicas = _changed(before, change), change.replicas or len(fleet.replicas)
        say("checking that it fits", 0.0)
        await check_room(fleet, recipe, num_replicas)
        surplus = sorted(fleet.replicas, key=lambda replica: replica.is_given_up)[num_replicas:]
        num_lost = sum(not replica.is_given_up for replica in surplus)
        for replica in reversed(surplus):
            say(f"handing on the requests of replica {replica.replica_id}", 0.1)
            await self._remove(replica)
        fleet.recipe = recipe
        try:
            await self._reshape_all(recipe, say, but=_shape(recipe))
            if (num_missing := num_replicas - len(fleet.replicas)) > 0:
                say(f"forming {num_missing} more", 0.8)
                await self._add(num_missing)
        except (ClusterError, ConnectionError, OperationFailedError) as error:
            fleet.recipe = before
            outcome = await self._go_back(before, num_lost)
            raise OperationFailedError(f"{error}; {outcome}") from error

    async def _go_back(self, recipe: MeshRecipe, num_removed: int) -> str:
        """What became of the fleet."""
        for replica in self._fleet.replicas:
            if _shape(replica.recipe) != _shape(recipe):
                await replica.reshape_at_last(recipe)
        if not num_removed:
            return "the fleet runs as before"
        for _ in range(_TRIES_TO_GO_BACK):
            try:
                await self._add(num_removed)
                return "the fleet runs as before"
            except (ClusterError, ConnectionError) as error:
                _log.error("%d replicas could not be formed again: %s", num_removed, error)
        return f"the fleet runs in its old shape, but {num_removed} of its replicas could not be formed again"

    async def _add(self, num_replicas: int) -> None:
        """Raises ClusterError or ConnectionError; the driver knows none of them then."""
        try:
            await self._fleet.add(num_replicas)
        except BaseException:
            kept = {replica.replica_id for replica in self._fleet.replicas}
            for status in self._driver.fleet.snapshot().replicas:
                if status.replica_id not in kept:
                    await self._driver.retire(status.replica_id)
            raise

    async def _reload(self, source: str, say: Say) -> None:
        before = self._fleet.recipe
        say(f"fetching {source}", 0.0)
        recipe = await load_recipe(before, source)
        await self._reshape_all(recipe, say)
        self._fleet.recipe = recipe
        self._driver.fleet.model_id = source
        self._driver.journal.set_model(recipe.config.model.identity)

    async def _reshape_all(self, recipe: MeshRecipe, say: Say, but: ParallelSettings | None = None) -> None:
        """One replica after the other, so that the others go on serving; all go back when one fails.

        Those that run in the shape ``but`` are left alone.
        """
        replicas = [one for one in self._fleet.replicas if one.is_given_up or _shape(one.recipe) != but]
        before = [replica.recipe for replica in replicas]
        for number, replica in enumerate(replicas):
            say(f"forming replica {replica.replica_id} anew", number / len(replicas))
            try:
                await replica.reshape(recipe)
            except (ClusterError, ConnectionError) as error:
                for changed, old in zip(replicas[:number], before, strict=False):
                    await changed.reshape_at_last(old)
                raise OperationFailedError(f"replica {replica.replica_id}: {error}") from error

    async def _remove(self, replica: Replica) -> None:
        await self._driver.retire(replica.replica_id)
        await self._fleet.remove(replica)

    async def _drain(self, timeout_s: float, say: Say) -> None:
        fleet, end_s = self._driver.fleet, time.monotonic() + timeout_s
        self._driver.refuse_new("the server is draining")
        while (num_live := fleet.snapshot().num_live_requests) and (left_s := end_s - time.monotonic()) > 0:
            say(f"waiting for {num_live} requests to end, {left_s:.0f} s at most", 0.1)
            await self._driver.wait_until_idle(min(left_s, _DRAIN_LOOK_S))
        say("stopping the server", 1.0)
        self.stop_asked.set()

    # What the cluster tells.

    def _on_cluster(self, event: ClusterEvent) -> None:
        match event:
            case PlacementWaiting(replica_id, reason, remaining_s):
                self._show(replica_id, f"{reason} (waiting {remaining_s:.0f} s more)", 0.0, waits_for_room=True)
            case ShardProgress(replica_id, rank, host, _, doing, fraction):
                self._show(replica_id, f"rank {rank} on {host}: {doing}", fraction)
            case ReplicaLost(replica_id, _, cause):
                self._driver.fleet.set_failure(replica_id, cause)
            case ShardMeasured(replica_id, rank, load):
                self._driver.fleet.set_load(replica_id, rank, load)
            case ReplicaGaveUp(replica_id, reason):
                self._driver.give_up(replica_id, reason)
        self._on_event(event)

    def _show(self, replica_id: int, doing: str, fraction: float, waits_for_room: bool = False) -> None:
        """What a replica that does not run yet is at. While it lacks room, new requests are better refused."""
        if self._operation is not None:
            self._operation.note(f"replica {replica_id}: {doing}")
        fleet = self._driver.fleet
        state = fleet.state_of(replica_id)
        if state is FleetState.RECOVERING and not waits_for_room:
            fleet.set_recovering(replica_id, doing, fraction)
        elif state is not FleetState.READY:
            fleet.set_loading(replica_id, doing, fraction)

    def _on_link_lost(self, replica_id: int) -> None:
        for replica in self._fleet.replicas:
            if replica.replica_id == replica_id:
                replica.link_lost()

    def _set_spares(self, num_ready: int) -> None:
        self._driver.fleet.set_spares(num_ready, self._config.cluster.spares)

    @property
    def _fleet(self) -> ReplicaSet:
        if self._replicas is None:
            raise OperationRefusedError("the fleet is being formed for the first time; try again when it serves")
        return self._replicas


def _changed(recipe: MeshRecipe, change: ShapeChange) -> MeshRecipe:
    """Raises OperationRefusedError."""
    parallel = recipe.config.parallel
    tp_size = change.tensor_parallel_size or parallel.tensor_parallel_size
    pp_size = change.pipeline_parallel_size or parallel.pipeline_parallel_size
    same_tp, same_pp = tp_size == parallel.tensor_parallel_size, pp_size == parallel.pipeline_parallel_size
    try:
        shape = dataclasses.replace(
            parallel,
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=pp_size,
            replicas=change.replicas or parallel.replicas,
            tensor_split=change.tensor_split or (parallel.tensor_split if same_tp else None),
            stage_layers=change.stage_layers or (parallel.stage_layers if same_pp else None),
        )
    except ValidationError as error:
        raise OperationRefusedError("; ".join(problem["msg"] for problem in error.errors())) from error
    return MeshRecipe(dataclasses.replace(recipe.config, parallel=shape), recipe.model_dir)


def _shape(recipe: MeshRecipe) -> ParallelSettings:
    """What every replica of a recipe looks like."""
    return dataclasses.replace(recipe.config.parallel, replicas=1)
