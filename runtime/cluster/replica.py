"""Replicas: from settings to running meshes, and back to nothing left behind.

``ReplicaSet.start`` gives replicas with an address, a secret and shards; the future ``failed`` of each ends with the
reason when its mesh is no more; ``ReplicaSet.stop`` takes everything back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.events import (
    EventSink,
    PlacementWaiting,
    ReplicaFailed,
    ReplicaFormed,
    ShardProgress,
    ignore_events,
)
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, form
from shardray.runtime.cluster.layout import CoreShare, core_shares
from shardray.runtime.cluster.placement import HostsNeed, place
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost, start_host
from shardray.runtime.cluster.supervise import MeshWatch
from shardray.runtime.config import Config
from shardray.runtime.engine.assignment import ShardInfo

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 5.0
_T = TypeVar("_T")


class Replica:
    """One mesh and the hosts it is made of. ``failed`` is done, with the reason, when the mesh is no more."""

    def __init__(self, replica_id: int, recipe: MeshRecipe, is_local: bool, events: EventSink) -> None:
        self.replica_id = replica_id
        self.hosts: list[RemoteHost] = []
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._recipe = recipe
        self._is_local = is_local
        self._events = events
        self._group: PlacementGroup | None = None
        self._mesh: FormedMesh | None = None
        self._watch: MeshWatch | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port of the leader's gRPC server."""
        return self._formed.address

    @property
    def secret(self) -> str:
        """Shown by whoever calls the leader."""
        return self._formed.secret

    @property
    def shards(self) -> list[ShardInfo]:
        """In rank order."""
        return list(self._formed.shards)

    @property
    def _formed(self) -> FormedMesh:
        if self._mesh is None:
            raise ClusterError(f"replica {self.replica_id} is not formed")
        return self._mesh

    async def place(self, need: HostsNeed) -> None:
        """Get room for the hosts and start them, unassigned. Raises ClusterError."""
        timeout_s = self._recipe.config.ray.form_timeout_s
        self._group = await place(need, timeout_s, can_grow=not self._is_local, on_wait=self._on_wait)
        starting = (start_host(self._group, index, need, timeout_s) for index in range(need.num_hosts))
        self.hosts = await _all_of(starting)

    async def form(self, shares: Sequence[CoreShare]) -> None:
        """Form the mesh and set it running under watch; ``shares`` go with ``hosts``. Raises FormError."""
        bind_hosts = ["127.0.0.1" if self._is_local else host.info.host for host in self.hosts]
        self._mesh = await form(self.hosts, shares, self._recipe, bind_hosts, self._on_progress)
        self._watch = MeshWatch(self._mesh, self._recipe.config.engine.step_timeout_s)
        self._watching = asyncio.create_task(self._until_failure(self._watch))
        self._events(ReplicaFormed(self.replica_id))

    async def stop(self) -> None:
        """End the mesh between two steps and give back everything. Idempotent; works in any state."""
        if self._watch is not None and self._watching is not None:
            if not self._watching.done():
                await self._watch.stop(_STOP_TIMEOUT_S)
            await self._watching
            self._watch = None
        await self._give_back()
        self.failed.cancel()

    async def _until_failure(self, watch: MeshWatch) -> None:
        failure = await watch.failure()
        if failure is None:
            return
        _log.error("replica %d failed: %s", self.replica_id, failure.reason)
        await self._give_back()
        if not self.failed.done():
            self.failed.set_result(failure.reason)
        self._events(ReplicaFailed(self.replica_id, failure.reason))

    async def _give_back(self) -> None:
        hosts, self.hosts = self.hosts, []
        await asyncio.gather(*(host.kill() for host in hosts))
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(remove_placement_group, group)

    def _on_wait(self, reason: str, remaining_s: float) -> None:
        self._events(PlacementWaiting(self.replica_id, reason, remaining_s))

    def _on_progress(self, rank: int, host: RemoteHost, doing: str, fraction: float) -> None:
        self._events(ShardProgress(self.replica_id, rank, host.info.host, host.info.pid, doing, fraction))


class ReplicaSet:
    """All replicas of a fleet, on one connection to Ray."""

    def __init__(self, session: RaySession, replicas: Sequence[Replica]) -> None:
        self._session = session
        self.replicas = list(replicas)

    @classmethod
    async def start(cls, config: Config, model_dir: str | Path, events: EventSink = ignore_events) -> ReplicaSet:
        """Connect to Ray, place the hosts and form every replica.

        Raises ClusterError, with nothing left behind.
        """
        session = await _open_session(config)
        recipe = MeshRecipe(config, str(model_dir))
        replicas = [Replica(index, recipe, session.is_local, events) for index in range(config.parallel.replicas)]
        fleet = cls(session, replicas)
        try:
            need = await asyncio.to_thread(hosts_need, config)
            await _all_of(replica.place(need) for replica in replicas)
            hosts = [host.info for replica in replicas for host in replica.hosts]
            shares = iter(core_shares(hosts, config.engine.threads_per_host))
            await _all_of(replica.form([next(shares) for _ in replica.hosts]) for replica in replicas)
        except BaseException:
            await fleet.stop()
            raise
        return fleet

    async def stop(self) -> None:
        """Stop every replica and leave Ray; a local Ray ends. Idempotent."""
        try:
            await asyncio.gather(*(replica.stop() for replica in self.replicas))
        finally:
            await asyncio.to_thread(self._session.stop)


def hosts_need(config: Config) -> HostsNeed:
    """What one replica asks of the cluster; blocks on Ray."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    device = config.engine.device
    return HostsNeed(
        num_hosts=config.parallel.hosts_per_replica,
        cpus_per_host=config.ray.cpus_per_host,
        gpus_per_host=1 if device == "cuda" or (device == "auto" and num_gpus > 0) else 0,
        strategy=config.ray.placement_strategy,
    )


async def _open_session(config: Config) -> RaySession:
    """Ray's start cannot be broken off: when cancelled, wait for it and undo it."""
    opening = asyncio.create_task(asyncio.to_thread(RaySession, config.ray, config.parallel.num_hosts))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with contextlib.suppress(ClusterError):
            session = await opening
            await asyncio.to_thread(session.stop)
        raise


async def _all_of(awaitables: Iterable[Awaitable[_T]]) -> list[_T]:
    """Run all; the first ClusterError cancels the others and is raised by itself."""

    async def run(awaitable: Awaitable[_T]) -> _T:
        return await awaitable

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(awaitable)) for awaitable in awaitables]
    except* ClusterError as errors:
        first = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first
