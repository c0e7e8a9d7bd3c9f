"""A replica: a mesh that is formed again whenever it ends, and formed anew when its shape is to change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from shardray.runtime.cluster.crash_loop import CrashLoop
from shardray.runtime.cluster.errors import ClusterError, FormError, PlacementError
from shardray.runtime.cluster.events import (
    EventSink,
    PlacementWaiting,
    ReplicaGaveUp,
    ReplicaLost,
    ReplicaRecovered,
    ShardProgress,
    load_sink,
)
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe
from shardray.runtime.cluster.layout import CoreShare
from shardray.runtime.cluster.mesh_slot import MeshSlot
from shardray.runtime.cluster.outlet import Outlet
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.ray_call import cluster_answers
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.shapes import smaller_recipes
from shardray.runtime.cluster.supervise import MeshFailure

_log = logging.getLogger(__name__)
_ROOM_S = 0.5  # to find out whether there is room for a second mesh beside the first
_RETRY_S = 1.0  # between two looks for room
_RELINK_S = 1.0  # for the end of the mesh to show, which is the common cause
_HEAD_ANSWERS_S = 3.0


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
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pool, self._outlet = pool, outlet
        on_load = load_sink(replica_id, events)
        self._empty_slot = partial(MeshSlot, pool, partial(shares, self), is_local, self._on_progress, on_load)
        self._slot = self._empty_slot()
        self._events = events
        self._crash_loop = CrashLoop(recipe.config.cluster.max_failed_forms)
        self._lock = asyncio.Lock()  # held by whoever changes the mesh
        self._keeper: asyncio.Task[None] | None = None
        self._relinking: asyncio.Task[None] | None = None
        self._growing: asyncio.Task[None] | None = None

    @property
    def hosts(self) -> list[RemoteHost]:
        """All that it holds, in a mesh or not."""
        return self._slot.hosts

    @property
    def mesh(self) -> FormedMesh | None:
        """What runs now."""
        return self._slot.mesh

    @property
    def is_given_up(self) -> bool:
        return self.gave_up.done()

    async def place(self) -> None:
        """Get the hosts for the first mesh. Raises ClusterError."""
        await self._slot.gather_anew(self.recipe, self._on_wait, self._timeout_s)

    async def start(self) -> None:
        """Form the first mesh, and keep one from then on. Raises ClusterError."""
        async with self._lock:
            await self._slot.form(self.recipe)
            await self._attach()
        self._start_keeping()

    async def adopt(self, mesh: FormedMesh) -> None:
        """Go on with a mesh that runs already. Raises ConnectionError if it cannot be reached."""
        async with self._lock:
            self._slot.run(mesh, self.recipe)
            await self._attach()
        self._start_keeping()

    async def reshape(self, recipe: MeshRecipe) -> None:
        """Go over to ``recipe`` on new hosts: beside the present mesh if there is room, else in its place.

        Raises ClusterError; the replica then runs as before, or is being formed as before, or is given up as before.
        """
        async with self._lock:
            was_given_up, slot = self.is_given_up, self._empty_slot()
            try:
                try:
                    await slot.gather_anew(recipe, self._ignore_wait, _ROOM_S)
                except PlacementError:
                    await self._reshape_in_place(recipe)
                else:
                    await self._reshape_beside(recipe, slot)
            except ClusterError as error:
                if was_given_up:
                    await self._slot.keep_only(())
                    self._give_up(f"given up; another try failed: {error}")
                raise
        if was_given_up:  # it runs again, by the operator's grace
            self.gave_up = asyncio.get_running_loop().create_future()
            self._crash_loop.forget()
            self._start_keeping()

    async def reshape_at_last(self, recipe: MeshRecipe) -> None:
        """Go over to ``recipe``; where that fails, go on forming it until it runs or is given up."""
        try:
            await self.reshape(recipe)
        except ClusterError as error:
            async with self._lock:
                if self.is_given_up:
                    return
                self._outlet.down(self.replica_id, "its shape is being changed back", failed=False)
                await self._slot.let_go()
                self.recipe = recipe
                await self._form_until_it_runs(str(error))

    def link_lost(self) -> None:
        """The outlet lost its connection to the mesh; if that still runs, it is connected again, or else replaced.

        If Ray's head does not answer either, it is this process that is cut off: no mesh that runs is ended for that.
        """
        self._relinking = asyncio.create_task(self._relink(self._slot.mesh))

    async def stop(self) -> None:
        """End the mesh between two steps and give the hosts back. Idempotent; works in any state."""
        tasks = [task for task in (self._keeper, self._relinking, self._growing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._slot.let_go()
        await self._slot.keep_only(())
        self.gave_up.cancel()

    def _start_keeping(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(self._on_keeper_end)

    def _on_keeper_end(self, keeper: asyncio.Task[None]) -> None:
        """Nobody would notice the end of a mesh any longer: say so, rather than let requests wait for nothing."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None and not self.is_given_up:
            _log.error("replica %d is not kept any longer", self.replica_id, exc_info=error)
            self._give_up(f"an error of its keeper: {type(error).__name__}: {error}")

    async def _keep(self) -> None:
        while not self.is_given_up:
            watch = self._slot.watch
            assert watch is not None
            failure = await watch.failure()
            async with self._lock:
                if watch is self._slot.watch and failure is not None:
                    with self._pool.forming():
                        await self._recover(failure)

    async def _relink(self, mesh: FormedMesh | None) -> None:
        while True:
            await asyncio.sleep(_RELINK_S)
            async with self._lock:
                slot = self._slot
                if mesh is None or mesh is not slot.mesh or slot.watch is None or slot.watch.is_ending:
                    return
                could_be_reached = await cluster_answers(_HEAD_ANSWERS_S)
                try:
                    await self._outlet.up(self.replica_id, mesh)
                    return
                except ConnectionError as error:
                    if could_be_reached and await cluster_answers(_HEAD_ANSWERS_S):
                        _log.error("replica %d: %s; it is formed again", self.replica_id, error)
                        await mesh.hosts[0].kill()  # the watch finds it dead
                        return
                    _log.warning("replica %d: %s; nor does Ray, so it is tried again", self.replica_id, error)

    async def _recover(self, failure: MeshFailure) -> None:
        began_s = time.monotonic()
        self._outlet.down(self.replica_id, failure.reason, failed=True)
        _log.error("replica %d lost its mesh: %s", self.replica_id, failure.reason)
        self._events(ReplicaLost(self.replica_id, failure.reason, failure.failures[0]))
        self._crash_loop.note_end(self._slot.age_s)
        await self._slot.clear(failure.survivors)
        if await self._form_until_it_runs(failure.reason):
            times = self._slot.times(failure.noticed_s, began_s)
            _log.warning("replica %d runs again after %.2f s (%s)", self.replica_id, times.recovery_s, times)
            self._events(ReplicaRecovered(self.replica_id, times))

    async def _form_until_it_runs(self, last_error: str) -> bool:
        """Form the mesh, as often as it takes; False if that was given up. Waiting for room does not count."""
        while not self._crash_loop.is_hopeless:
            await asyncio.sleep(self._crash_loop.back_off_s)
            try:
                await self._form_what_fits()
                return True
            except PlacementError as error:
                last_error = str(error)
                await asyncio.sleep(_RETRY_S)
            except (ClusterError, ConnectionError) as error:
                last_error = str(error)
                self._crash_loop.note_failed_form()
                _log.error("replica %d could not be formed again: %s", self.replica_id, last_error)
        await self._slot.keep_only(())
        self._give_up(f"given up after {self._crash_loop.num_failures} failures in a row, the last one: {last_error}")
        return False

    def _give_up(self, reason: str) -> None:
        _log.critical("replica %d: %s", self.replica_id, reason)
        if not self.is_given_up:
            self.gave_up.set_result(reason)
        self._events(ReplicaGaveUp(self.replica_id, reason))

    async def _form_what_fits(self) -> None:
        """Form the configured shape, or the best smaller one that there is room for if the fleet may degrade."""
        if not self.recipe.config.cluster.degrade:
            return await self._form(self.recipe, self._timeout_s)
        for recipe in (self.recipe, *smaller_recipes(self.recipe)):
            try:
                await self._form(recipe, _ROOM_S)
            except PlacementError as error:
                shortage = error
                continue
            if recipe is not self.recipe:
                _log.warning("replica %d runs on %d of %d hosts", self.replica_id, recipe.size, self.recipe.size)
                self._growing = asyncio.create_task(self._grow_back())
            return None
        raise shortage

    async def _form(self, recipe: MeshRecipe, timeout_s: float) -> None:
        """From the hosts at hand and as many more as it takes. Raises ClusterError or ConnectionError."""
        await self._slot.gather(recipe, self._on_wait, timeout_s)
        await self._slot.form(recipe)
        await self._attach()

    async def _attach(self) -> None:
        """Send the mesh requests. Raises ConnectionError; the mesh has ended then."""
        assert self._slot.mesh is not None
        try:
            await self._outlet.up(self.replica_id, self._slot.mesh)
        except ConnectionError:
            await self._slot.let_go()
            raise

    async def _grow_back(self) -> None:
        """Once there is room for the configured shape, form it."""
        while True:
            await asyncio.sleep(_RETRY_S)
            async with self._lock:
                slot = self._slot
                if slot.mesh is None or len(slot.hosts) >= self.recipe.size:
                    return
                try:
                    hosts = await self._pool.take(self.recipe.size, self._ignore_wait, _ROOM_S, slot.hosts)
                except ClusterError:
                    continue
                with self._pool.forming():
                    self._pool.give_back(hosts[len(slot.hosts) :])  # so that they are not lost if this is broken off
                    self._outlet.down(self.replica_id, "there is room for its configured shape again", failed=False)
                    await slot.let_go()
                    await self._form_until_it_runs("")
                return

    async def _reshape_beside(self, recipe: MeshRecipe, slot: MeshSlot) -> None:
        before = self.recipe, self._slot
        try:
            await slot.form(recipe)
            self.recipe, self._slot = recipe, slot
            await self._attach()
        except (ClusterError, ConnectionError) as error:
            await slot.keep_only(())
            self.recipe, self._slot = before  # not touched yet: requests still go there
            raise FormError(str(error)) from error
        await before[1].retire()

    async def _reshape_in_place(self, recipe: MeshRecipe) -> None:
        self._outlet.down(self.replica_id, "its shape is being changed", failed=False)
        await self._slot.let_go()
        before, self.recipe = self.recipe, recipe
        try:
            if recipe.size <= len(self.hosts):  # a group cannot shrink: give it back, and take another
                await self._slot.keep_only(())
                await self._pool.free_surplus()
            await self._form(recipe, self._timeout_s)
        except (ClusterError, ConnectionError) as error:
            self.recipe = before
            if not self.is_given_up:
                await self._form_until_it_runs(str(error))
            raise FormError(str(error)) from error

    @property
    def _timeout_s(self) -> float:
        return self.recipe.config.ray.form_timeout_s

    def _on_wait(self, reason: str, remaining_s: float) -> None:
        self._events(PlacementWaiting(self.replica_id, reason, remaining_s))

    def _ignore_wait(self, reason: str, remaining_s: float) -> None:
        """No room beside the present mesh: then in its place."""

    def _on_progress(self, rank: int, host: RemoteHost, doing: str, fraction: float) -> None:
        self._events(ShardProgress(self.replica_id, rank, host.info.host, host.info.pid, doing, fraction))
