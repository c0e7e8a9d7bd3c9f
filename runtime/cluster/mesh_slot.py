"""What a replica holds: hosts, and the mesh that runs on them under watch.

empty --gather--> hosts --form--> mesh --let_go--> hosts --keep_only(())--> empty
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shardray.runtime.cluster.errors import FormError
from shardray.runtime.cluster.events import RecoveryTimes
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, RankProgress, dissolve, form
from shardray.runtime.cluster.layout import CoreShare
from shardray.runtime.cluster.placement import WaitSink
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.supervise import MeshWatch
from shardray.runtime.engine.assignment import ShardLoad

_STOP_TIMEOUT_S = 5.0

LoadSink = Callable[[int, ShardLoad], None]  # (rank, its load)
Shares = Callable[[Sequence[RemoteHost]], list[CoreShare]]  # the cores of hosts that are to be a mesh


class MeshSlot:
    """One mesh at a time. Not for several tasks at once: its owner holds a lock."""

    def __init__(
        self, pool: HostPool, shares: Shares, is_local: bool, on_progress: RankProgress, on_load: LoadSink
    ) -> None:
        self.hosts: list[RemoteHost] = []  # in the mesh or not
        self.mesh: FormedMesh | None = None
        self.watch: MeshWatch | None = None  # over the mesh
        self._pool = pool
        self._shares = shares
        self._is_local = is_local
        self._on_progress = on_progress
        self._on_load = on_load
        self._gathered_s = self._formed_s = 0.0

    async def gather(self, recipe: MeshRecipe, on_wait: WaitSink, timeout_s: float) -> None:
        """As many hosts as ``recipe`` needs, those that it has among them. Raises ClusterError."""
        self._pool.give_back(self.hosts[recipe.size :])
        self.hosts = self.hosts[: recipe.size]
        self.hosts = await self._pool.take(recipe.size, on_wait, timeout_s, self.hosts)
        self._gathered_s = time.monotonic()

    async def gather_anew(self, recipe: MeshRecipe, on_wait: WaitSink, timeout_s: float) -> None:
        """Into an empty slot: all hosts in one new group. Raises ClusterError."""
        self.hosts = await self._pool.take(recipe.size, on_wait, timeout_s, fresh=True)

    async def form(self, recipe: MeshRecipe) -> None:
        """Form the mesh from all hosts and set it running. Raises FormError; hosts that can be used again are kept."""
        bind_hosts = ["127.0.0.1" if self._is_local else host.info.host for host in self.hosts]
        try:
            mesh = await form(self.hosts, self._shares(self.hosts), recipe, bind_hosts, self._on_progress)
        except FormError as error:
            await self.keep_only(error.survivors)
            raise
        self.run(mesh, recipe)

    def run(self, mesh: FormedMesh, recipe: MeshRecipe) -> None:
        """Watch over a formed mesh; it is set running if it does not run yet."""
        self.hosts = list(mesh.hosts)
        self.mesh, self.watch = mesh, MeshWatch(mesh, recipe.config.engine.step_timeout_s, self._on_load)
        self._formed_s = time.monotonic()

    async def clear(self, survivors: Sequence[RemoteHost]) -> None:
        """The mesh has ended; its hosts are dead but for ``survivors``."""
        self.mesh = self.watch = None
        await self.keep_only(survivors)

    async def let_go(self) -> None:
        """End the mesh between two steps; its hosts have no place afterwards."""
        mesh, watch = self.mesh, self.watch
        self.mesh = self.watch = None
        if mesh is not None and watch is not None:
            await watch.stop(_STOP_TIMEOUT_S)
            await self.keep_only(await dissolve(mesh.hosts))

    async def retire(self) -> None:
        """End the mesh between two steps, and every host."""
        if self.watch is not None:
            await self.watch.stop(_STOP_TIMEOUT_S)
        await self.clear(())

    async def keep_only(self, hosts: Sequence[RemoteHost]) -> None:
        """End the other hosts."""
        gone = [host for host in self.hosts if host not in hosts]
        self.hosts = list(hosts)
        await self._pool.discard(gone)

    @property
    def age_s(self) -> float:
        """Since the mesh was set running."""
        return time.monotonic() - self._formed_s

    def times(self, noticed_s: float, fenced_s: float) -> RecoveryTimes:
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
