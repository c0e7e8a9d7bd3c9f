"""A replica: a mesh that is formed again whenever it ends, and formed anew when its shape is to change.

Whoever sends it requests is its outlet: told when a mesh is up, and when it is down until the next one is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shardray.runtime.cluster.errors import ClusterError, FormError, PlacementError
from shardray.runtime.cluster.events import (
    EventSink,
    PlacementWaiting,
    RecoveryTimes,
    ReplicaFormed,
    ReplicaGaveUp,
    ReplicaLost,
    ReplicaRecovered,
    ShardProgress,
    load_sink,
)
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, dissolve, form
from shardray.runtime.cluster.layout import CoreShare
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.shapes import smaller_recipes
from shardray.runtime.cluster.supervise import MeshFailure, MeshWatch

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 5.0
_ROOM_S = 0.5  # to find out whether there is room for a second mesh beside the first
_RETRY_S = 1.0  # between two looks for room
_RELINK_S = 1.0  # for the end of the mesh to show, which is the common cause
_INFANCY_S = 5.0  # a mesh that ends sooner counts as one that could not be formed
_MAX_BACK_OFF_S = 10.0


class Outlet(Protocol):
    """Sends requests to meshes."""

    async def up(self, replica_id: int, mesh: FormedMesh) -> None:
        """Use ``mesh`` from now on, also for what its forerunner has not finished. Raises ConnectionError."""

    def down(self, replica_id: int, reason: str) -> None:
        """The mesh is no more; keep its requests until the next one is up."""


class Replica:
    """One mesh at a time. ``gave_up`` is done, with the reason, when it is not formed again any more."""

    def __init__(
        self,
        replica_id: int,
        recipe: MeshRecipe,
        pool: HostPool,
        outlet: Outlet,
        shares: Callable[[Replica, Sequence[RemoteHost]], list[CoreShare]],
        is_local: bool,
        events: EventSink,
    ) -> None:
        self.replica_id = replica_id
        self.recipe = recipe
        self.hosts: list[RemoteHost] = []  # all that it holds, in a mesh or not
        self.mesh: FormedMesh | None = None
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pool = pool
        self._outlet = outlet
        self._shares = shares
        self._is_local = is_local
        self._events = events
        self._watch: MeshWatch | None = None
        self._gathered_s = self._formed_s = 0.0
        self._num_failures = 0  # in a row
        self._lock = asyncio.Lock()  # held by whoever changes the mesh
        self._keeper: asyncio.Task[None] | None = None
        self._relinking: asyncio.Task[None] | None = None
        self._growing: asyncio.Task[None] | None = None

    async def place(self) -> None:
        """Get the hosts for the first mesh. Raises ClusterError."""
        self.hosts = await self._pool.take(self.recipe.size, self._on_wait, self._timeout_s, fresh=True)

    async def start(self) -> None:
        """Form the first mesh, and keep one from then on. Raises ClusterError."""
        async with self._lock:
            await self._go(await self._form(self.hosts, self.recipe))
        self._start_keeping()

    async def adopt(self, mesh: FormedMesh) -> None:
        """Go on with a mesh that runs already. Raises ConnectionError if it cannot be reached."""
        self.hosts = list(mesh.hosts)
        async with self._lock:
            await self._go(mesh)
        self._start_keeping()

    async def reshape(self, recipe: MeshRecipe) -> None:
        """Go over to ``recipe`` on new hosts: beside the present mesh if there is room, else in its place.

        Raises ClusterError; the replica then runs as before, or is being formed as before.
        """
        async with self._lock:
            try:
                hosts = await self._pool.take(recipe.size, self._ignore_wait, _ROOM_S, fresh=True)
            except PlacementError:
                await self._reshape_in_place(recipe)
            else:
                await self._reshape_beside(recipe, hosts)
        if self.gave_up.done():  # it runs again, by the operator's grace
            self.gave_up = asyncio.get_running_loop().create_future()
            self._num_failures = 0
            self._start_keeping()

    async def reshape_at_last(self, recipe: MeshRecipe) -> None:
        """Go over to ``recipe``; where that fails, go on forming it until it runs or is given up."""
        try:
            await self.reshape(recipe)
        except ClusterError as error:
            async with self._lock:
                if self.gave_up.done():
                    return
                self._outlet.down(self.replica_id, "its shape is being changed back")
                await self._let_go(_STOP_TIMEOUT_S)
                self.recipe = recipe
                await self._form_until_it_runs(str(error))

    def link_lost(self) -> None:
        """The outlet lost its connection to the mesh; if that still runs, it is connected again, or else replaced."""
        self._relinking = asyncio.create_task(self._relink(self.mesh))

    async def stop(self) -> None:
        """End the mesh between two steps and give the hosts back. Idempotent; works in any state."""
        tasks = [task for task in (self._keeper, self._relinking, self._growing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._let_go(_STOP_TIMEOUT_S)
        await self._pool.discard(self.hosts)
        self.hosts = []
        self.gave_up.cancel()

    def _start_keeping(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(self._on_keeper_end)

    def _on_keeper_end(self, keeper: asyncio.Task[None]) -> None:
        """Nobody would notice the end of a mesh any longer: say so, rather than let requests wait for nothing."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None and not self.gave_up.done():
            _log.error("replica %d is not kept any longer", self.replica_id, exc_info=error)
            self._give_up(f"an error of its keeper: {type(error).__name__}: {error}")

    async def _keep(self) -> None:
        while not self.gave_up.done():
            watch = self._watch
            assert watch is not None
            failure = await watch.failure()
            async with self._lock:
                if watch is self._watch and failure is not None:
                    with self._pool.forming():
                        await self._recover(failure)

    async def _relink(self, mesh: FormedMesh | None) -> None:
        await asyncio.sleep(_RELINK_S)
        async with self._lock:
            if mesh is None or mesh is not self.mesh or self._watch is None or self._watch.is_ending:
                return
            try:
                await self._outlet.up(self.replica_id, mesh)
            except ConnectionError as error:
                _log.error("replica %d: %s; it is formed again", self.replica_id, error)
                await mesh.hosts[0].kill()  # the watch finds it dead

    async def _recover(self, failure: MeshFailure) -> None:
        began_s = time.monotonic()
        self._outlet.down(self.replica_id, failure.reason)
        _log.error("replica %d lost its mesh: %s", self.replica_id, failure.reason)
        self._events(ReplicaLost(self.replica_id, failure.reason, failure.failures[0]))
        self._num_failures = self._num_failures + 1 if began_s - self._formed_s < _INFANCY_S else 0
        self.mesh = self._watch = None
        await self._keep_only(failure.survivors)
        if await self._form_until_it_runs(failure.reason):
            times = self._times(failure.noticed_s, began_s)
            _log.warning("replica %d runs again after %.2f s (%s)", self.replica_id, times.recovery_s, times)
            self._events(ReplicaRecovered(self.replica_id, times))

    async def _form_until_it_runs(self, last_error: str) -> bool:
        """Form the mesh, as often as it takes; False if that was given up. Waiting for room does not count."""
        while self._num_failures < self.recipe.config.cluster.max_failed_forms:
            if self._num_failures:
                await asyncio.sleep(min(_MAX_BACK_OFF_S, 0.25 * 2 ** (self._num_failures - 1)))
            try:
                await self._form_what_fits()
                return True
            except PlacementError as error:
                last_error = str(error)
                await asyncio.sleep(_RETRY_S)
            except (ClusterError, ConnectionError) as error:
                last_error = str(error)
                self._num_failures += 1
                _log.error("replica %d could not be formed again: %s", self.replica_id, last_error)
        await self._keep_only(())
        self._give_up(f"given up after {self._num_failures} failures in a row, the last one: {last_error}")
        return False

    def _give_up(self, reason: str) -> None:
        _log.critical("replica %d: %s", self.replica_id, reason)
        self.gave_up.set_result(reason)
        self._events(ReplicaGaveUp(self.replica_id, reason))

    async def _form_what_fits(self) -> None:
        """Form the configured shape, or the best smaller one that there is room for if the fleet may degrade."""
        if not self.recipe.config.cluster.degrade:
            await self._gather(self.recipe, self._timeout_s)
            return await self._go(await self._form(self.hosts, self.recipe))
        for recipe in (self.recipe, *smaller_recipes(self.recipe)):
            try:
                await self._gather(recipe, _ROOM_S)
            except PlacementError as error:
                shortage = error
                continue
            await self._go(await self._form(self.hosts, recipe))
            if recipe is not self.recipe:
                _log.warning("replica %d runs on %d of %d hosts", self.replica_id, recipe.size, self.recipe.size)
                self._growing = asyncio.create_task(self._grow_back())
            return None
        raise shortage

    async def _grow_back(self) -> None:
        """Once there is room for the configured shape, form it."""
        while True:
            await asyncio.sleep(_RETRY_S)
            async with self._lock:
                if self.mesh is None or len(self.hosts) >= self.recipe.size:
                    return
                try:
                    hosts = await self._pool.take(self.recipe.size, self._ignore_wait, _ROOM_S, self.hosts)
                except ClusterError:
                    continue
                added = hosts[len(self.hosts) :]
                self._outlet.down(self.replica_id, "there is room for its configured shape again")
                await self._let_go(_STOP_TIMEOUT_S)
                self.hosts += added
                await self._form_until_it_runs("")
                return

    async def _reshape_beside(self, recipe: MeshRecipe, hosts: list[RemoteHost]) -> None:
        before = self.recipe, self.hosts, self.mesh, self._watch
        try:
            mesh = await self._form(hosts, recipe)
            self.recipe, self.hosts = recipe, hosts
            await self._go(mesh)
        except (ClusterError, ConnectionError) as error:
            await self._pool.discard(hosts)
            self.recipe, self.hosts, self.mesh, self._watch = before  # not touched yet: requests still go there
            raise FormError(str(error)) from error
        _, old_hosts, _, old_watch = before
        if old_watch is not None:
            await old_watch.stop(_STOP_TIMEOUT_S)
        await self._pool.discard(old_hosts)

    async def _reshape_in_place(self, recipe: MeshRecipe) -> None:
        self._outlet.down(self.replica_id, "its shape is being changed")
        await self._let_go(_STOP_TIMEOUT_S)
        before, self.recipe = self.recipe, recipe
        try:
            if recipe.size <= len(self.hosts):  # a group cannot shrink: give it back, and take another
                await self._keep_only(())
                await self._pool.free_surplus()
            await self._gather(recipe, self._timeout_s)
            await self._go(await self._form(self.hosts, recipe))
        except (ClusterError, ConnectionError) as error:
            self.recipe = before
            await self._form_until_it_runs(str(error))
            raise FormError(str(error)) from error

    async def _gather(self, recipe: MeshRecipe, timeout_s: float) -> None:
        """As many hosts as ``recipe`` needs, those that it has among them. Raises ClusterError."""
        self._pool.give_back(self.hosts[recipe.size :])
        self.hosts = self.hosts[: recipe.size]
        self.hosts = await self._pool.take(recipe.size, self._on_wait, timeout_s, self.hosts)
        self._gathered_s = time.monotonic()

    async def _form(self, hosts: Sequence[RemoteHost], recipe: MeshRecipe) -> FormedMesh:
        """Raises FormError; ``self.hosts`` then has those that can be used again."""
        bind_hosts = ["127.0.0.1" if self._is_local else host.info.host for host in hosts]
        try:
            return await form(hosts, self._shares(self, hosts), recipe, bind_hosts, self._on_progress)
        except FormError as error:
            if hosts is self.hosts:
                await self._keep_only(error.survivors)
            raise

    async def _go(self, mesh: FormedMesh) -> None:
        """Set a mesh running under watch and send it requests. Raises ConnectionError."""
        tell_load = load_sink(self.replica_id, self._events)
        self.mesh, self._watch = mesh, MeshWatch(mesh, self.recipe.config.engine.step_timeout_s, tell_load)
        self._formed_s = time.monotonic()
        try:
            await self._outlet.up(self.replica_id, mesh)
        except ConnectionError:
            await self._let_go(_STOP_TIMEOUT_S)
            raise
        self._events(ReplicaFormed(self.replica_id))

    async def _let_go(self, timeout_s: float) -> None:
        """End the mesh between two steps; its hosts have no place afterwards."""
        mesh, watch = self.mesh, self._watch
        self.mesh = self._watch = None
        if mesh is None or watch is None:
            return
        await watch.stop(timeout_s)
        await self._keep_only(await dissolve(mesh.hosts))

    def _times(self, noticed_s: float, fenced_s: float) -> RecoveryTimes:
        """Of the recovery that has just ended; both on the monotonic clock."""
        assert self.mesh is not None
        now = time.monotonic()
        return RecoveryTimes(
            noticed_s=time.time() - (now - noticed_s),
            fence_s=fenced_s - noticed_s,
            hosts_s=self._gathered_s - fenced_s,
            form_s=self._formed_s - self._gathered_s - self.mesh.load_s,
            load_s=self.mesh.load_s,
            attach_s=now - self._formed_s,
        )

    async def _keep_only(self, hosts: Sequence[RemoteHost]) -> None:
        gone = [host for host in self.hosts if host not in hosts]
        self.hosts = list(hosts)
        await self._pool.discard(gone)

    @property
    def _timeout_s(self) -> float:
        return self.recipe.config.ray.form_timeout_s

    def _on_wait(self, reason: str, remaining_s: float) -> None:
        self._events(PlacementWaiting(self.replica_id, reason, remaining_s))

    def _ignore_wait(self, reason: str, remaining_s: float) -> None:
        """No room beside the present mesh: then in its place."""

    def _on_progress(self, rank: int, host: RemoteHost, doing: str, fraction: float) -> None:
        self._events(ShardProgress(self.replica_id, rank, host.info.host, host.info.pid, doing, fraction))
