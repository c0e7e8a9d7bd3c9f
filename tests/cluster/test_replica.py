"""Replicas come up from settings alone, answer like one process, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray

from shardray.runtime.cluster.errors import PlacementError
from shardray.runtime.cluster.events import ClusterEvent, ReplicaFailed, ReplicaFormed, ShardProgress
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.replica import ReplicaSet
from tests.cluster.fleets import descendants, fleet_config, generate, reference_ids, running, until_gone

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


async def _all_cpus_are_free(timeout_s: float = 5.0) -> bool:
    for _ in range(int(timeout_s / 0.1)):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        await asyncio.sleep(0.1)
    return False


def _pids(fleet: ReplicaSet) -> list[int]:
    return [shard.pid for replica in fleet.replicas for shard in replica.shards]


async def test_two_replicas_answer_like_one_process_and_leave_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    events: list[ClusterEvent] = []
    async with running(fleet_config(tiny_llama, tp_size=2, replicas=2), events.append) as fleet:
        answers = await asyncio.gather(*(generate(replica) for replica in fleet.replicas))
        assert answers == [reference_ids(tiny_llama)] * 2
        pids = _pids(fleet)
        assert len(set(pids)) == 4
    assert await until_gone(pids) == []
    assert await _all_cpus_are_free()
    assert {event.replica_id for event in events if isinstance(event, ReplicaFormed)} == {0, 1}
    assert {event.rank for event in events if isinstance(event, ShardProgress)} == {0, 1}


async def test_a_replica_that_fails_says_why_and_gives_everything_back(
    local_ray: RaySession, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[ClusterEvent] = []
    async with running(fleet_config(tiny_llama, pp_size=2), events.append) as fleet:
        replica, pids = fleet.replicas[0], _pids(fleet)
        os.kill(pids[1], signal.SIGKILL)
        reason = await asyncio.wait_for(replica.failed, timeout=10)
        assert reason.startswith("stage 1 tensor rank 0 (host ")
        assert f"pid {pids[1]}) died" in reason
        assert events[-1] == ReplicaFailed(0, reason)
        assert await until_gone(pids) == []
        assert await _all_cpus_are_free()
    assert "raylet" not in capfd.readouterr().out, "Ray's own words about a death stay off stdout"


async def test_a_fleet_that_cannot_be_placed_leaves_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(PlacementError, match=f"needs {num_cpus + 1} CPU bundles, the cluster has {num_cpus} on 1 node"):
        await ReplicaSet.start(fleet_config(tiny_llama, tp_size=num_cpus + 1), tiny_llama)
    assert await _all_cpus_are_free()


async def test_a_start_that_is_cancelled_leaves_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    before = descendants()
    starting = asyncio.create_task(ReplicaSet.start(fleet_config(tiny_llama, tp_size=2), tiny_llama))
    await asyncio.sleep(0.8)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await _all_cpus_are_free()
    assert await _idle_only(descendants() - before)


async def _idle_only(pids: Sequence[int] | set[int]) -> bool:
    """Whether no process but Ray's idle workers is left of ``pids``."""
    for _ in range(50):
        commands = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        if not any(path.exists() and path.read_bytes().startswith(b"ray::Host") for path in commands):
            return True
        await asyncio.sleep(0.1)
    return False
