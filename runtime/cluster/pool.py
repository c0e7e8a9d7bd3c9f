"""The hosts of a fleet: started on the bundles of placement groups, idle or lent to a mesh, replaced when they die.

A group is a gang of seats that Ray gave at once. A host that dies leaves its seat, and the next one is started there. A
seat whose node is gone is Ray's to move; until it has, the seat cannot be used. Groups without hosts are given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group_table, remove_placement_group

from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.errors import ClusterError, PlacementError
from shardray.runtime.cluster.lease import RENEWAL_S, give_back_groups, group_prefix
from shardray.runtime.cluster.placement import HostsNeed, WaitSink, place, shortage_now
from shardray.runtime.cluster.remote_host import RemoteHost, start_host

_log = logging.getLogger(__name__)
_POLL_S = 0.25
_PING_S = 1.0  # an idle host that does not answer within this is not one to build on
_SPARE_CHECK_S = 2.0
_SETTLE_S = 1.0  # before spares are started: what just recovered needs the cores more


@dataclass(eq=False)
class _Seat:
    group: PlacementGroup
    group_name: str
    bundle: int
    host: RemoteHost | None = None
    starting: bool = False

    @property
    def is_vacant(self) -> bool:
        return self.host is None and not self.starting


@dataclass(frozen=True)
class HostKind:
    """What every host of a fleet asks of the cluster, and the limits of asking."""

    need: HostsNeed  # of one replica as configured
    num_threads: int  # of an idle host; a mesh sets its own
    model_dir: str  # that idle hosts are prepared for
    dtype: str
    start_timeout_s: float
    can_grow: bool  # whether more nodes may come: then lack of room is waited for
    namespace: str  # of Ray
    owner: str  # the driver, in the hosts' leases
    lease_s: float
    tls: TlsFiles | None = None


@dataclass
class HostPool:
    """``take`` hosts, ``give_back`` what still lives, ``discard`` what does not. Use it in one asyncio loop."""

    kind: HostKind
    num_spares: int
    on_spares: Callable[[int], None] = lambda num_ready: None
    _seats: list[_Seat] = field(default_factory=list)
    _idle: list[RemoteHost] = field(default_factory=list)
    _num_takers: int = 0
    _num_forming: int = 0
    _keeper: asyncio.Task[None] | None = None
    _renewer: asyncio.Task[None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def idle(self) -> list[RemoteHost]:
        """Hosts that belong to no mesh."""
        return list(self._idle)

    async def take(
        self,
        num_hosts: int,
        on_wait: WaitSink,
        timeout_s: float,
        held: Sequence[RemoteHost] = (),
        fresh: bool = False,
    ) -> list[RemoteHost]:
        """``num_hosts`` hosts without a place in a mesh: ``held``, then idle ones, then new ones.

        ``fresh``: all of them in one new group. Waits up to ``timeout_s`` for room. Raises PlacementError, HostDied or
        HostSilent; ``held`` stay the caller's then.
        """
        hosts = list(held)
        self._num_takers += 1
        try:
            if fresh:
                await self.free_surplus()
            else:
                await self._take_started(hosts, num_hosts, on_wait, timeout_s)
            if len(hosts) < num_hosts:
                hosts += await self._start_group(num_hosts - len(hosts), on_wait, timeout_s)
        except BaseException:
            self.give_back([host for host in hosts if host not in held])
            raise
        finally:
            self._num_takers -= 1
            self.on_spares(len(self._idle))
            self._changed.set()
        return hosts

    def give_back(self, hosts: Sequence[RemoteHost]) -> None:
        """Take hosts back that live and have no place in a mesh."""
        self._idle += hosts
        self._changed.set()

    async def discard(self, hosts: Sequence[RemoteHost]) -> None:
        """End hosts, dead or alive; their seats are free for others."""
        for seat in self._seats:
            if seat.host in hosts:
                seat.host = None
        self._idle = [host for host in self._idle if host not in hosts]
        await asyncio.gather(*(host.kill() for host in hosts))
        self._changed.set()

    async def free_surplus(self) -> None:
        """End idle hosts that are no spares, and give back groups without hosts: room for groups of another size."""
        surplus = max(0, len(self._idle) - self.num_spares)
        await self.discard(self._most_crowded(self._idle)[:surplus])
        await self._give_back_groups_but({seat.group_name for seat in self._seats if not seat.is_vacant})

    async def adopt(self, hosts: Sequence[RemoteHost]) -> None:
        """Know the seats of hosts that another driver started; groups of this fleet without any are given back."""
        names = {host.info.group for host in hosts}
        await asyncio.to_thread(give_back_groups, self.kind.namespace, names)
        for name in names:
            group = await asyncio.to_thread(get_placement_group, name)
            sitting = {host.info.bundle: host for host in hosts if host.info.group == name}
            self._seats += [_Seat(group, name, bundle, sitting.get(bundle)) for bundle in range(group.bundle_count)]

    @contextlib.contextmanager
    def forming(self) -> Iterator[None]:
        """While a mesh is formed, no spare is started: streams wait for the cores."""
        self._num_forming += 1
        try:
            yield
        finally:
            self._num_forming -= 1
            self._changed.set()

    def start_keeping(self) -> None:
        """From now on keep as many spares as configured, and give back what nobody needs."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())

    def start_renewing(self) -> None:
        """From now on renew the leases of all hosts."""
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew())

    async def close(self) -> None:
        """End every host and give back every group. Idempotent."""
        tasks = [task for task in (self._keeper, self._renewer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.discard([seat.host for seat in self._seats if seat.host is not None])
        await self._give_back_groups_but(set())

    async def _take_started(self, hosts: list[RemoteHost], num_hosts: int, on_wait: WaitSink, timeout_s: float) -> None:
        """Fill ``hosts`` from the idle ones and from vacant seats, waiting for seats that Ray has yet to move."""
        deadline = time.monotonic() + timeout_s
        while len(hosts) < num_hosts:
            if self._idle:
                host = self._idle.pop(0)
                hosts.append(host)
                if await _silent([host]):
                    hosts.remove(host)
                    await self.discard([host])
                continue
            vacant = [seat for seat in self._seats if seat.is_vacant][: num_hosts - len(hosts)]
            usable = await self._usable(vacant)
            hosts += await self._start_all(usable)
            if usable:
                continue
            if not vacant:
                return
            self._check_deadline(deadline, num_hosts - len(hosts), timeout_s, on_wait)
            await asyncio.sleep(_POLL_S)

    def _check_deadline(self, deadline: float, num_missing: int, timeout_s: float, on_wait: WaitSink) -> None:
        bundles = "1 bundle" if num_missing == 1 else f"{num_missing} bundles"
        reason = f"the node of {bundles} is gone and no other has room"
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise PlacementError(f"{reason}; gave up after {timeout_s:g} s")
        on_wait(reason, remaining_s)

    async def _start_group(self, num_hosts: int, on_wait: WaitSink, timeout_s: float) -> list[RemoteHost]:
        need = self.kind.need.of(num_hosts)
        name = f"{group_prefix(self.kind.namespace)}{uuid.uuid4().hex}"
        group = await place(need, name, timeout_s, can_grow=self.kind.can_grow, on_wait=on_wait)
        seats = [_Seat(group, name, bundle) for bundle in range(num_hosts)]
        self._seats += seats
        return await self._start_all(seats)

    async def _start_all(self, seats: Sequence[_Seat]) -> list[RemoteHost]:
        """A host on every seat; when one cannot be started, the others become idle and its error is raised."""
        for seat in seats:
            seat.starting = True  # at once: a group whose seats are all vacant is given back
        results = await asyncio.gather(*(self._start(seat) for seat in seats), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        hosts = [result for result in results if not isinstance(result, BaseException)]
        if errors:
            self.give_back(hosts)
            raise errors[0]
        return hosts

    async def _start(self, seat: _Seat) -> RemoteHost:
        seat.starting = True
        try:
            need, timeout_s = self.kind.need, self.kind.start_timeout_s
            host = await start_host(seat.group, seat.group_name, seat.bundle, need, timeout_s)
            await host.renew(self.kind.owner, self.kind.lease_s)
            seat.host = host
        finally:
            seat.starting = False
        return seat.host

    async def _usable(self, seats: Sequence[_Seat]) -> list[_Seat]:
        """Those whose node is there; Ray looks for another place for the rest."""
        if not seats:
            return []
        alive = await asyncio.to_thread(_alive_nodes)
        tables = [await asyncio.to_thread(placement_group_table, seat.group) for seat in seats]
        return [
            seat
            for seat, table in zip(seats, tables, strict=True)
            if table["state"] == "CREATED" and table["bundles_to_node_id"][seat.bundle] in alive and seat.is_vacant
        ]

    async def _renew(self) -> None:
        """A host that does not answer is its mesh's watch's to find."""
        while True:
            hosts = [seat.host for seat in self._seats if seat.host is not None]
            owner, lease_s = self.kind.owner, self.kind.lease_s
            await asyncio.gather(*(host.renew(owner, lease_s) for host in hosts), return_exceptions=True)
            await asyncio.sleep(RENEWAL_S)

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            await asyncio.sleep(_SETTLE_S)
            if self._num_takers == self._num_forming == 0:
                try:
                    await self._settle()
                except ClusterError as error:
                    _log.warning("no spare could be started: %s", error)
            self.on_spares(len(self._idle))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _SPARE_CHECK_S if self.num_spares else None)

    async def _settle(self) -> None:
        """As many idle hosts as there are to be spares, no empty group."""
        silent = await _silent(self.idle)
        await self.discard([host for host in silent if host in self._idle])  # one may have been taken meanwhile
        if len(self._idle) < self.num_spares:
            await self._start_spare()
        await self.free_surplus()

    def _most_crowded(self, hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
        """Hosts of the largest groups first: ending those empties groups, which is what frees their room."""
        sizes = Counter(seat.group_name for seat in self._seats)
        group_of = {seat.host: seat.group_name for seat in self._seats if seat.host is not None}
        return sorted(hosts, key=lambda host: -sizes[group_of[host]])

    async def _start_spare(self) -> None:
        vacant = [seat for seat in self._seats if seat.is_vacant]
        usable = await self._usable(vacant)
        if usable:
            spares = [await self._start(usable[0])]
        elif await asyncio.to_thread(shortage_now, self.kind.need.of(1)) is None:
            spares = await self._start_group(1, lambda reason, remaining_s: None, _SPARE_CHECK_S)
        else:
            return
        try:
            kind = self.kind
            await spares[0].prepare(kind.num_threads, kind.model_dir, kind.dtype, kind.tls, kind.start_timeout_s)
        except ClusterError:
            await self.discard(spares)
            raise
        self.give_back(spares)

    async def _give_back_groups_but(self, kept: set[str]) -> None:
        lost = {seat.group_name: seat.group for seat in self._seats if seat.group_name not in kept}
        self._seats = [seat for seat in self._seats if seat.group_name in kept]
        await asyncio.gather(*(asyncio.to_thread(remove_placement_group, group) for group in lost.values()))


async def _silent(hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
    """Those that do not answer."""

    async def is_silent(host: RemoteHost) -> bool:
        try:
            await host.progress(_PING_S)
        except ClusterError:
            return True
        return False

    flags = await asyncio.gather(*(is_silent(host) for host in hosts))
    return [host for host, silent in zip(hosts, flags, strict=True) if silent]


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
