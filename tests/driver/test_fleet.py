"""The fleet says truly what its replicas do, and tells whoever watches."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from shardray.runtime.cluster.reports import FailureKind, RankFailure
from shardray.runtime.driver.fleet import Fleet, FleetState
from shardray.runtime.engine.assignment import ShardLoad
from shardray.runtime.engine.request import EngineStats
from tests.serving import SHARD

pytestmark = pytest.mark.asyncio


async def test_a_new_fleet_is_loading_and_says_so() -> None:
    status = Fleet("m").snapshot()
    assert status.state is FleetState.LOADING
    assert "no replica" in status.reason


async def test_one_ready_replica_makes_the_fleet_ready() -> None:
    fleet = Fleet("m")
    fleet.set_failed(0, "out of memory")
    fleet.set_loading(1, "loading weights", 0.5)
    assert fleet.snapshot().state is FleetState.LOADING
    fleet.set_ready(1, [SHARD])
    status = fleet.snapshot()
    assert (status.state, status.reason) == (FleetState.READY, "")
    assert status.replicas[1].shards == (SHARD,)


async def test_a_fleet_of_failed_replicas_names_the_reason_of_each() -> None:
    fleet = Fleet("m")
    fleet.set_failed(1, "host lost")
    fleet.set_failed(0, "out of memory")
    assert fleet.snapshot().reason == "replica 0: out of memory; replica 1: host lost"


async def test_a_stopping_fleet_is_not_ready_whatever_its_replicas_do() -> None:
    fleet = Fleet("m")
    fleet.set_ready(0, [])
    fleet.stop("shutting down")
    assert fleet.snapshot().state is FleetState.STOPPING


async def test_a_watch_begins_with_the_present_tells_changes_and_ends_on_close() -> None:
    fleet = Fleet("m")
    seen: list[FleetState] = []

    async def watch() -> None:
        async for status in fleet.watch():
            seen.append(status.state)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.02)
    fleet.set_ready(0, [])
    await asyncio.sleep(0.02)
    fleet.close()
    await asyncio.wait_for(task, 1)
    assert seen[:2] == [FleetState.LOADING, FleetState.READY]


async def test_changes_within_the_interval_are_merged_and_close_does_not_wait_for_it() -> None:
    fleet = Fleet("m")
    snapshots = fleet.watch(min_interval_s=30)
    await anext(snapshots)
    for progress in (0.1, 0.2, 0.3):
        fleet.set_loading(0, "loading", progress)
    asyncio.get_running_loop().call_later(0.02, fleet.close)
    assert (await asyncio.wait_for(anext(snapshots), 1)).replicas[0].progress == 0.3
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(snapshots), 1)


async def test_the_output_rate_is_that_between_snapshots_and_zero_when_idle() -> None:
    fleet = Fleet("m")
    fleet.set_ready(0, [])
    fleet.set_stats(0, EngineStats(num_running=1, num_output_tokens=0))
    await asyncio.sleep(0.05)
    fleet.set_stats(0, EngineStats(num_running=1, num_output_tokens=100))
    assert 0 < fleet.snapshot().replicas[0].output_tokens_per_s <= 100 / 0.05
    fleet.set_stats(0, EngineStats(num_output_tokens=100))
    assert fleet.snapshot().replicas[0].output_tokens_per_s == 0


async def test_the_output_rate_starts_anew_with_another_mesh() -> None:
    fleet = Fleet("m")
    fleet.set_ready(0, [])
    fleet.set_stats(0, EngineStats(num_running=1, num_output_tokens=1000))
    fleet.set_recovering(0)
    fleet.set_ready(0, [SHARD])
    assert fleet.snapshot().replicas[0].stats == EngineStats()
    fleet.set_stats(0, EngineStats(num_running=1, num_output_tokens=5))
    assert fleet.snapshot().replicas[0].output_tokens_per_s == 0
    await asyncio.sleep(0.01)
    fleet.set_stats(0, EngineStats(num_running=1, num_output_tokens=9))
    assert fleet.snapshot().replicas[0].output_tokens_per_s > 0


async def test_a_recovering_replica_is_told_with_its_reason_unless_another_one_is_ready() -> None:
    fleet = Fleet("m")
    fleet.set_loading(1, "loading weights")
    fleet.set_recovering(0, "placing a host", 0.25)
    status = fleet.snapshot()
    assert (status.state, status.reason) == (FleetState.RECOVERING, "replica 0: placing a host")
    fleet.set_ready(1, [])
    assert fleet.snapshot().state is FleetState.READY
    assert fleet.snapshot().replicas[0].reason == "placing a host"


async def test_ready_after_a_failure_is_one_recovery_however_often_it_failed_on_the_way() -> None:
    fleet = Fleet("m")
    fleet.set_ready(0, [])
    place = {"rank": 0, "stage": 0, "tp_rank": 0, "host": "10.0.0.2", "pid": 77}
    for cause in ("killed", "killed again"):
        fleet.set_recovering(0, cause)
        fleet.set_failure(0, RankFailure(**place, kind=FailureKind.DIED, cause=cause))
    fleet.set_ready(0, [])
    [replica] = fleet.snapshot().replicas
    assert (replica.num_recoveries, replica.last_failure and replica.last_failure.cause) == (1, "killed again")


async def test_a_change_of_shape_is_no_recovery() -> None:
    fleet = Fleet("m")
    fleet.set_ready(0, [])
    fleet.set_recovering(0, "scaling")
    fleet.set_ready(0, [])
    assert fleet.snapshot().replicas[0].num_recoveries == 0


async def test_what_shards_tell_is_kept_by_rank_and_cut_to_the_mesh_that_is_ready() -> None:
    fleet = Fleet("m")
    fleet.set_loading(0)
    load = ShardLoad(num_steps=3, busy_s=0.5, memory_bytes=7)
    fleet.set_load(0, 1, load)  # before the mesh is known to be ready
    fleet.set_load(9, 0, load)  # of a replica that is gone
    shards = [msgspec.structs.replace(SHARD, rank=rank) for rank in range(2)]
    fleet.set_ready(0, shards)
    [replica] = fleet.snapshot().replicas
    assert [replica.load_of(shard) for shard in shards] == [None, load]
    fleet.set_ready(0, shards[:1])
    [replica] = fleet.snapshot().replicas
    assert replica.loads == (None,)


async def test_operations_are_counted_by_name_and_outcome() -> None:
    fleet = Fleet("m")
    for outcome in ("ok", "refused", "ok"):
        fleet.count_operation("scale", outcome)
    assert sorted(fleet.snapshot().ended_operations) == [("scale", "ok", 2), ("scale", "refused", 1)]
