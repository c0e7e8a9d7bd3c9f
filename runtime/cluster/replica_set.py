"""All replicas of a fleet: started together, added, removed and stopped, on one connection to Ray and one pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import ray

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.events import EventSink, ignore_events
from shardray.runtime.cluster.form import MeshRecipe, tls_files
from shardray.runtime.cluster.layout import CoreShare, core_shares
from shardray.runtime.cluster.outlet import Outlet
from shardray.runtime.cluster.placement import HostsNeed, free_bundles, node_memory
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.ray_call import in_ray
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.replica import Replica
from shardray.runtime.cluster.seating import HostKind
from shardray.runtime.cluster.takeover import FoundFleet, take_over
from shardray.runtime.config import Config

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ReplicaSet:
    """Use it in one asyncio loop."""

    def __init__(self, session: RaySession, pool: HostPool, recipe: MeshRecipe, outlet: Outlet, events: EventSink):
        self.pool = pool
        self.recipe = recipe  # of replicas that are yet to come
        self._session = session
        self._outlet = outlet
        self._events = events
        self._replicas: dict[int, Replica] = {}

    @classmethod
    async def start(
        cls,
        config: Config,
        model_dir: str | Path,
        outlet: Outlet,
        events: EventSink = ignore_events,
        on_spares: Callable[[int], None] = lambda num_ready: None,
    ) -> ReplicaSet:
        """Connect to Ray; take over what a driver that is gone left running, place and form what is missing.

        Raises TlsError, ClusterError or ConnectionError, with nothing left behind.
        """
        if (tls := tls_files(config)) is not None:
            tls.check()
        session = await _open_session(config)
        owner, recipe = uuid.uuid4().hex, MeshRecipe(config, str(model_dir))
        try:
            need = await in_ray(hosts_need, config)
            found = await take_over(owner, recipe, need.gpus_per_host > 0)
        except BaseException:
            await asyncio.to_thread(session.stop)
            raise
        kind = HostKind(
            need=need,
            num_threads=config.engine.threads_per_host or 1,
            model_dir=str(model_dir),
            dtype=config.model.dtype,
            start_timeout_s=config.ray.form_timeout_s,
            can_grow=not session.is_local,
            namespace=config.ray.namespace,
            owner=owner,
            lease_s=config.cluster.lease_s,
            tls=tls,
        )
        pool = HostPool(kind, config.cluster.spares, on_spares)
        fleet = cls(session, pool, recipe, outlet, events)
        try:
            pool.start_renewing()
            await fleet._adopt(found)
            await fleet.add(config.parallel.replicas - len(fleet.replicas))
        except BaseException:
            await fleet.stop()
            raise
        pool.start_keeping()
        return fleet

    @property
    def replicas(self) -> list[Replica]:
        """In order of their ids."""
        return [self._replicas[replica_id] for replica_id in sorted(self._replicas)]

    async def _adopt(self, found: FoundFleet) -> None:
        await self.pool.adopt([*found.idle, *(host for mesh, _ in found.meshes for host in mesh.hosts)])
        self.pool.give_back(found.idle)
        for mesh, recipe in found.meshes:
            replica = self._make(len(self._replicas))
            self.recipe = replica.recipe = recipe
            self._replicas[replica.replica_id] = replica
            try:
                await replica.adopt(mesh)
            except ConnectionError as error:  # it has ended since it was found
                _log.warning("replica %d could not be taken over: %s", replica.replica_id, error)
                await self.remove(replica)
            else:
                _log.warning("replica %d was taken over as it runs, on %d hosts", replica.replica_id, recipe.size)

    async def add(self, num_replicas: int) -> None:
        """Form more replicas. Raises ClusterError or ConnectionError; none of them is left then."""
        free_ids = (number for number in range(len(self._replicas) + num_replicas) if number not in self._replicas)
        added = [self._make(replica_id) for replica_id, _ in zip(free_ids, range(num_replicas), strict=False)]
        self._replicas.update((replica.replica_id, replica) for replica in added)
        try:
            await _all_of(replica.place() for replica in added)
            await _all_of(replica.start() for replica in added)
        except BaseException:
            await asyncio.gather(*(self.remove(replica) for replica in added))
            raise

    async def remove(self, replica: Replica) -> None:
        """Stop a replica; its requests are the outlet's to place elsewhere, before."""
        await replica.stop()
        self._replicas.pop(replica.replica_id, None)

    async def shortage_of(self, num_hosts: int) -> str | None:
        """Why there can be no ``num_hosts`` hosts, those that the replicas have included; None if there can."""
        num_free = await in_ray(free_bundles, self.pool.kind.need)
        num_own = sum(len(replica.hosts) for replica in self.replicas)
        if num_hosts <= num_free + num_own:
            return None
        unit = self.pool.kind.need.unit
        return f"needs {num_hosts} {unit} bundles, the fleet has {num_own} and the cluster {num_free} free"

    @property
    def is_on_gpus(self) -> bool:
        """Whether each host has a GPU."""
        return self.pool.kind.need.gpus_per_host > 0

    async def memory_of_devices(self) -> list[int]:
        """Bytes of each GPU in a mesh, none while no mesh runs; on CPUs, of each node that could hold a host."""
        if not self.is_on_gpus:
            return await in_ray(node_memory, self.pool.kind.need)
        meshes = [replica.mesh for replica in self.replicas if replica.mesh is not None]
        return [shard.device_bytes for mesh in meshes for shard in mesh.shards]

    async def stop(self) -> None:
        """Stop every replica and leave Ray; a local Ray ends. Idempotent."""
        try:
            await asyncio.gather(*(self.remove(replica) for replica in self.replicas))
            await self.pool.close()
        finally:
            await asyncio.to_thread(self._session.stop)

    def _make(self, replica_id: int) -> Replica:
        is_local = self._session.is_local
        return Replica(replica_id, self.recipe, self.pool, self._outlet, self._shares, is_local, self._events)

    def _shares(self, replica: Replica, hosts: Sequence[RemoteHost]) -> list[CoreShare]:
        """The cores of ``hosts``, next mesh of ``replica``, where every other replica keeps its own."""
        owners = [(other, list(hosts) if other is replica else other.hosts) for other in self.replicas]
        everyone = [host for _, theirs in owners for host in theirs]
        shares = core_shares([host.info for host in everyone], replica.recipe.config.engine.threads_per_host)
        return [share for host, share in zip(everyone, shares, strict=True) if host in hosts]


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
    num_hosts = config.parallel.num_hosts + config.cluster.spares
    opening = asyncio.create_task(asyncio.to_thread(RaySession, config.ray, num_hosts))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with contextlib.suppress(ClusterError):
            session = await opening
            await asyncio.to_thread(session.stop)
        raise


async def _all_of(awaitables: Iterable[Awaitable[_T]]) -> list[_T]:
    """Run all; the first of their own errors cancels the others and is raised by itself."""

    async def run(awaitable: Awaitable[_T]) -> _T:
        return await awaitable

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(awaitable)) for awaitable in awaitables]
    except* (ClusterError, ConnectionError) as errors:
        first = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first
