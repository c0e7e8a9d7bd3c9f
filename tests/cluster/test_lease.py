"""A host whose lease is over ends; the room of its fleet goes back only where no other host was renewed since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

from shardray.runtime.cluster.lease import RENEWAL_S
from shardray.runtime.cluster.placement import HostsNeed
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.seating import HostKind
from shardray.runtime.config import RaySettings
from tests.cluster.fleets import until_gone

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]

_OWNER = "driver"
_LEASE_S = 60.0


def _ignore(reason: str, remaining_s: float) -> None:
    pass


@asynccontextmanager
async def fleet_of_two() -> AsyncIterator[tuple[HostPool, RemoteHost, RemoteHost]]:
    """Two hosts, each in a group of its own; nobody renews their leases."""
    need = HostsNeed(num_hosts=1, cpus_per_host=1, gpus_per_host=0, strategy="PACK")
    namespace = RaySettings().namespace
    pool = HostPool(HostKind(need, 1, "", "float32", 30.0, False, namespace, _OWNER, _LEASE_S), num_spares=0)
    try:
        [one] = await pool.take(1, _ignore, timeout_s=30, fresh=True)
        [other] = await pool.take(1, _ignore, timeout_s=30, fresh=True)
        assert one.info.group != other.info.group
        yield pool, one, other
    finally:
        await pool.close()


def state_of_group(host: RemoteHost) -> str:
    return str(placement_group_table(get_placement_group(host.info.group))["state"])


async def test_a_host_that_its_driver_cannot_reach_takes_nobody_else_along(local_ray: RaySession) -> None:
    async with fleet_of_two() as (_, unreached, reached):
        await unreached.renew(_OWNER, 2 * RENEWAL_S + 2)
        await asyncio.sleep(2 * RENEWAL_S + 1)
        await reached.renew(_OWNER, _LEASE_S)
        assert await until_gone([unreached.info.pid]) == []
        await reached.progress()
        assert state_of_group(reached) == "CREATED"


async def test_the_last_host_of_a_driver_that_is_gone_gives_all_room_back(local_ray: RaySession) -> None:
    async with fleet_of_two() as (_, one, other):
        groups = [get_placement_group(host.info.group) for host in (one, other)]
        await one.renew(_OWNER, 2.0)
        await other.renew(_OWNER, 3.0)
        assert await until_gone([one.info.pid, other.info.pid]) == []
        assert [placement_group_table(group)["state"] for group in groups] == ["REMOVED", "REMOVED"]


async def test_a_host_that_lives_and_does_not_answer_keeps_its_room(local_ray: RaySession) -> None:
    """It may be of a fleet that goes on: what is not known to be given up is not given back."""
    async with fleet_of_two() as (_, lapsed, stopped):
        process = psutil.Process(stopped.info.pid)
        process.suspend()
        try:
            await lapsed.renew(_OWNER, 2.0)
            assert await until_gone([lapsed.info.pid], timeout_s=30) == []
            assert state_of_group(stopped) == "CREATED"
        finally:
            process.resume()


async def test_room_that_somebody_else_gave_back_is_asked_for_again(local_ray: RaySession) -> None:
    async with fleet_of_two() as (pool, one, other):
        for host in (one, other):
            remove_placement_group(get_placement_group(host.info.group))
        assert await until_gone([one.info.pid, other.info.pid]) == []
        await pool.discard([one, other])
        found = await pool.take(2, _ignore, timeout_s=30)
        assert [(await host.progress()).doing for host in found] == ["waiting for a place"] * 2
