"""Replicas on one machine hold their weights once, and a host that replaces a killed one finds them there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from shardray.runtime.cluster.ray_session import RaySession
from tests.cluster.fleets import fleet_config, generate, reference_ids, running, until_gone

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


def weights_of(pid: int) -> set[int]:
    """The inodes of memory for weights that a process maps."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {int(inode) for inode in re.findall(r"(\d+)\s+/memfd:shardray-weights-", maps)}


async def test_replicas_map_the_same_weights_and_so_does_a_host_that_replaces_one(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2, replicas=2, share_weights=True)) as (fleet, outlet):
        pids = [[shard.pid for shard in outlet.meshes[replica_id].shards] for replica_id in (0, 1)]
        held = [weights_of(pid) for pid in pids[0]]
        assert [len(inodes) for inodes in held] == [1, 1]
        assert held[0] != held[1]
        assert [weights_of(pid) for pid in pids[1]] == held
        before = outlet.meshes[0]
        os.kill(pids[0][1], signal.SIGKILL)
        mesh = await outlet.next_mesh(0, before)
        assert [weights_of(shard.pid) for shard in mesh.shards] == held
        answers = await asyncio.gather(*(generate(outlet.meshes[replica_id]) for replica_id in (0, 1)))
        assert answers == [reference_ids(tiny_llama)] * 2
        every = [host.info.pid for replica in fleet.replicas for host in replica.hosts]
    assert await until_gone(every) == []


async def test_weights_are_not_shared_where_the_settings_say_so(local_ray: RaySession, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, replicas=2, share_weights=False)) as (fleet, outlet):
        assert [weights_of(host.info.pid) for replica in fleet.replicas for host in replica.hosts] == [set(), set()]
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)
