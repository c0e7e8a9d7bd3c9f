"""Where the hosts of a fleet sit: the bundles of placement groups, and who was started on which.

A group is a gang of seats that Ray gave at once. A host that dies leaves its seat, and the next one is started there. A
seat whose node is gone is Ray's to move; until it has, the seat cannot be used. Groups without hosts are given back;
those that somebody else has removed are forgotten.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group_table, remove_placement_group

from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.lease import give_back_groups, group_prefix
from shardray.runtime.cluster.placement import HostsNeed, WaitSink, place
from shardray.runtime.cluster.ray_call import in_ray
from shardray.runtime.cluster.remote_host import RemoteHost, start_host


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


@dataclass(eq=False)
class Seat:
    """One bundle, and who sits there."""

    group: PlacementGroup
    group_name: str
    bundle: int
    host: RemoteHost | None = None
    starting: bool = False

    @property
    def is_vacant(self) -> bool:
        return self.host is None and not self.starting


class Seating:
    """All seats of a fleet. Use it in one asyncio loop."""

    def __init__(self, kind: HostKind) -> None:
        self._kind = kind
        self._seats: list[Seat] = []

    @property
    def hosts(self) -> list[RemoteHost]:
        """Everybody who sits, in a mesh or not."""
        return [seat.host for seat in self._seats if seat.host is not None]

    @property
    def vacant(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.is_vacant]

    async def usable(self) -> list[Seat]:
        """Vacant ones whose node is there; Ray looks for another place for the rest."""
        groups = {seat.group_name: seat.group for seat in self.vacant}
        if not groups:
            return []
        alive = await in_ray(_alive_nodes)
        tables = {name: await in_ray(placement_group_table, group) for name, group in groups.items()}
        removed = {name for name, table in tables.items() if table["state"] == "REMOVED"}
        self._seats = [seat for seat in self._seats if not (seat.is_vacant and seat.group_name in removed)]
        return [
            seat
            for seat in self.vacant
            if (table := tables.get(seat.group_name)) is not None
            and table["state"] == "CREATED"
            and table["bundles_to_node_id"][seat.bundle] in alive
        ]

    async def add_group(self, num_seats: int, on_wait: WaitSink, timeout_s: float) -> list[Seat]:
        """New seats, for hosts to be started on at once. Raises ClusterError."""
        name = f"{group_prefix(self._kind.namespace)}{uuid.uuid4().hex}"
        need = self._kind.need.of(num_seats)
        group = await place(need, name, timeout_s, can_grow=self._kind.can_grow, on_wait=on_wait)
        seats = [Seat(group, name, bundle) for bundle in range(num_seats)]
        self._seats += seats
        return seats

    async def start(self, seats: Sequence[Seat]) -> tuple[list[RemoteHost], list[BaseException]]:
        """Start a host on every seat; those that came up, and why the others did not."""
        for seat in seats:
            seat.starting = True  # at once: a group whose seats are all vacant is given back
        results = await asyncio.gather(*(self._start(seat) for seat in seats), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        return [result for result in results if not isinstance(result, BaseException)], errors

    async def adopt(self, hosts: Sequence[RemoteHost]) -> None:
        """Know the seats of hosts that another driver started; groups of this fleet without any are given back."""
        names = {host.info.group for host in hosts}
        await in_ray(give_back_groups, self._kind.namespace, names)
        for name in names:
            group = await in_ray(get_placement_group, name)
            sitting = {host.info.bundle: host for host in hosts if host.info.group == name}
            self._seats += [Seat(group, name, bundle, sitting.get(bundle)) for bundle in range(group.bundle_count)]

    def vacate(self, hosts: Sequence[RemoteHost]) -> None:
        """They sit no longer."""
        for seat in self._seats:
            if seat.host in hosts:
                seat.host = None

    def most_crowded(self, hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
        """Hosts of the largest groups first: ending those empties groups, which is what frees their room."""
        sizes = Counter(seat.group_name for seat in self._seats)
        group_of = {seat.host: seat.group_name for seat in self._seats if seat.host is not None}
        return sorted(hosts, key=lambda host: -sizes[group_of[host]])

    async def give_back_empty_groups(self) -> None:
        """Let Ray have the groups in which nobody sits, or is about to."""
        kept = {seat.group_name for seat in self._seats if not seat.is_vacant}
        empty = {seat.group_name: seat.group for seat in self._seats if seat.group_name not in kept}
        self._seats = [seat for seat in self._seats if seat.group_name in kept]
        await asyncio.gather(*(in_ray(remove_placement_group, group) for group in empty.values()))

    async def give_back_all(self) -> None:
        """Let Ray have every group; who still sits there is ended."""
        groups = {seat.group_name: seat.group for seat in self._seats}
        self._seats = []
        await asyncio.gather(*(in_ray(remove_placement_group, group) for group in groups.values()))

    async def _start(self, seat: Seat) -> RemoteHost:
        try:
            kind = self._kind
            host = await start_host(seat.group, seat.group_name, seat.bundle, kind.need, kind.start_timeout_s)
            await host.renew(kind.owner, kind.lease_s)
            seat.host = host
        finally:
            seat.starting = False
        return host


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
