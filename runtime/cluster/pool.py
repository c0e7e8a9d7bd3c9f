"""The hosts of a fleet: idle or lent to a mesh, replaced when they die, with as many spares as configured."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence

from shardray.runtime.cluster.errors import ClusterError, PlacementError
from shardray.runtime.cluster.lease import RENEWAL_S
from shardray.runtime.cluster.placement import WaitSink, shortage_now
from shardray.runtime.cluster.ray_call import in_ray
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.seating import HostKind, Seat, Seating

_log = logging.getLogger(__name__)
_POLL_S = 0.25
_PING_S = 1.0  # an idle host that does not answer within this is not one to build on
_SPARE_CHECK_S = 2.0
_SETTLE_S = 1.0  # before spares are started: what just recovered needs the cores more


class HostPool:
    """``take`` hosts, ``give_back`` what still lives, ``discard`` what does not. Use it in one asyncio loop."""

    def __init__(
        self, kind: HostKind, num_spares: int, on_spares: Callable[[int], None] = lambda num_ready: None
    ) -> None:
        self.kind = kind
        self._num_spares = num_spares
        self._on_spares = on_spares
        self._seating = Seating(kind)
        self._idle: list[RemoteHost] = []
        self._num_takers = 0
        self._num_forming = 0
        self._keeper: asyncio.Task[None] | None = None
        self._renewer: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

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

        ``fresh``: all of them in one new group. Waits up to ``timeout_s`` for room. Raises ClusterError; ``held`` stay
        the caller's then.
        """
        hosts = list(held)
        self._num_takers += 1
        try:
            if fresh:
                await self.free_surplus()
            else:
                await self._take_started(hosts, num_hosts, on_wait, timeout_s)
            if len(hosts) < num_hosts:
                seats = await self._seating.add_group(num_hosts - len(hosts), on_wait, timeout_s)
                hosts += await self._start(seats)
        except BaseException:
            self.give_back([host for host in hosts if host not in held])
            raise
        finally:
            self._num_takers -= 1
            self._on_spares(len(self._idle))
            self._changed.set()
        return hosts

    def give_back(self, hosts: Sequence[RemoteHost]) -> None:
        """Take hosts back that live and have no place in a mesh."""
        self._idle += hosts
        self._changed.set()

    async def discard(self, hosts: Sequence[RemoteHost]) -> None:
        """End hosts, dead or alive; their seats are free for others."""
        self._seating.vacate(hosts)
        self._idle = [host for host in self._idle if host not in hosts]
        await asyncio.gather(*(host.kill() for host in hosts))
        self._changed.set()

    async def free_surplus(self) -> None:
        """End idle hosts that are no spares, and give back groups without hosts: room for groups of another size."""
        surplus = max(0, len(self._idle) - self._num_spares)
        await self.discard(self._seating.most_crowded(self._idle)[:surplus])
        await self._seating.give_back_empty_groups()

    async def adopt(self, hosts: Sequence[RemoteHost]) -> None:
        """Know the seats of hosts that another driver started; groups of this fleet without any are given back."""
        await self._seating.adopt(hosts)

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
        await self.discard(self._seating.hosts)
        await self._seating.give_back_all()

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
            usable = (await self._seating.usable())[: num_hosts - len(hosts)]
            hosts += await self._start(usable)
            if usable:
                continue
            # Ray moves all that a group has lost at once; what is missing now may be less, and fit where that does not.
            await self._seating.give_back_empty_groups()
            if not self._seating.vacant:
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

    async def _start(self, seats: Sequence[Seat]) -> list[RemoteHost]:
        """A host on every seat; when one cannot be started, the others become idle and its error is raised."""
        hosts, errors = await self._seating.start(seats)
        if errors:
            self.give_back(hosts)
            raise errors[0]
        return hosts

    async def _renew(self) -> None:
        """A host that does not answer holds up nobody else's renewal; it is its mesh's watch's to find."""
        asked: dict[RemoteHost, asyncio.Future[tuple[bool | BaseException]]] = {}
        try:
            while True:
                if any(renewal.done() and False in renewal.result() for renewal in asked.values()):
                    _end_as_replaced()
                asked = {host: renewal for host, renewal in asked.items() if not renewal.done()}
                for host in self._seating.hosts:
                    if host not in asked:
                        renewal = host.renew(self.kind.owner, self.kind.lease_s)
                        asked[host] = asyncio.gather(renewal, return_exceptions=True)
                await asyncio.sleep(RENEWAL_S)
        finally:
            for renewing in asked.values():
                renewing.cancel()

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            await asyncio.sleep(_SETTLE_S)
            if self._num_takers == self._num_forming == 0:
                try:
                    await self._settle()
                except ClusterError as error:
                    _log.warning("no spare could be started: %s", error)
                except Exception:  # nobody waits for this task: without a word there would be no spares any more
                    _log.exception("the hosts could not be looked after; it is tried again")
            self._on_spares(len(self._idle))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _SPARE_CHECK_S if self._num_spares else None)

    async def _settle(self) -> None:
        """As many idle hosts as there are to be spares, no empty group."""
        silent = await _silent(self.idle)
        await self.discard([host for host in silent if host in self._idle])  # one may have been taken meanwhile
        if len(self._idle) < self._num_spares:
            await self._start_spare()
        await self.free_surplus()

    async def _start_spare(self) -> None:
        if usable := await self._seating.usable():
            seats = usable[:1]
        elif await in_ray(shortage_now, self.kind.need.of(1)) is None:
            seats = await self._seating.add_group(1, lambda reason, remaining_s: None, _SPARE_CHECK_S)
        else:
            return
        spares = await self._start(seats)
        try:
            kind = self.kind
            await spares[0].prepare(kind.num_threads, kind.model_dir, kind.dtype, kind.tls, kind.start_timeout_s)
        except ClusterError:
            await self.discard(spares)
            raise
        self.give_back(spares)


def _end_as_replaced() -> None:
    """At once: an orderly end would stop hosts, and they are another's now."""
    _log.critical(
        "another driver has taken the fleet over while this one was not heard: it ends, and leaves all as it is"
    )
    os._exit(1)


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
