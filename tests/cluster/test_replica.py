"""Replicas come up from settings alone, answer like one process, and leave nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
from ray.exceptions import RaySystemError
from ray.util.placement_group import placement_group, remove_placement_group

from shardray.runtime.cluster.errors import FormError, PlacementError
from shardray.runtime.cluster.events import ClusterEvent, ReplicaGaveUp, ReplicaLost, ShardProgress
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.cluster.placement import HostsNeed
from shardray.runtime.cluster.pool import HostPool
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.cluster.reports import FailureKind
from shardray.runtime.cluster.seating import HostKind
from shardray.runtime.driver.fit import check_room
from tests.cluster.fleets import (
    RecordingOutlet,
    descendants,
    fleet_config,
    generate,
    reference_ids,
    running,
    until_gone,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


async def _all_cpus_are_free(timeout_s: float = 5.0) -> bool:
    for _ in range(int(timeout_s / 0.1)):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        await asyncio.sleep(0.1)
    return False


def _pids(fleet: ReplicaSet) -> list[int]:
    return [host.info.pid for replica in fleet.replicas for host in replica.hosts]


async def test_two_replicas_answer_like_one_process_and_leave_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    events: list[ClusterEvent] = []
    async with running(fleet_config(tiny_llama, tp_size=2, replicas=2), events.append) as (fleet, outlet):
        answers = await asyncio.gather(*(generate(outlet.meshes[replica_id]) for replica_id in (0, 1)))
        assert answers == [reference_ids(tiny_llama)] * 2
        pids = _pids(fleet)
        assert len(set(pids)) == 4
    assert await until_gone(pids) == []
    assert await _all_cpus_are_free()
    told = {(event.replica_id, event.rank) for event in events if isinstance(event, ShardProgress)}
    assert told == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_killed_host_is_replaced_and_the_others_stay(
    local_ray: RaySession, tiny_llama: Path, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[ClusterEvent] = []
    async with running(fleet_config(tiny_llama, pp_size=2), events.append) as (fleet, outlet):
        before, pids = outlet.meshes[0], _pids(fleet)
        os.kill(pids[rank], signal.SIGKILL)
        mesh = await outlet.next_mesh(0, before)
        assert await generate(mesh) == reference_ids(tiny_llama)
        assert pids[1 - rank] in _pids(fleet)
        assert pids[rank] not in _pids(fleet)
        assert outlet.losses[0].startswith(f"stage {rank} tensor rank 0 (host ")
        assert f"pid {pids[rank]}) died" in outlet.losses[0]
        lost = next(event for event in events if isinstance(event, ReplicaLost))
        assert (lost.cause.stage, lost.cause.pid, lost.cause.kind) == (rank, pids[rank], FailureKind.DIED)
    assert await _all_cpus_are_free()
    assert "raylet" not in capfd.readouterr().out, "Ray's own words about a death stay off stdout"


async def test_a_warm_spare_takes_the_place_and_another_one_is_started(local_ray: RaySession, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2, spares=1)) as (fleet, outlet):
        before = outlet.meshes[0]
        spare = (await _idle_hosts(fleet, 1))[0]
        os.kill(before.hosts[1].info.pid, signal.SIGKILL)
        mesh = await outlet.next_mesh(0, before)
        assert spare.info.pid in [host.info.pid for host in mesh.hosts]
        assert await generate(mesh) == reference_ids(tiny_llama)
        assert (await _idle_hosts(fleet, 1))[0].info.pid != spare.info.pid
    assert await _all_cpus_are_free()


async def test_spares_are_kept_whatever_went_wrong_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shardray.runtime.cluster.pool._SETTLE_S", 0.01)
    monkeypatch.setattr("shardray.runtime.cluster.pool._SPARE_CHECK_S", 0.01)
    kept = HostPool(HostKind(HostsNeed(1, 1.0, 0, "PACK"), 1, "", "", 1.0, False, "", "", 1.0), num_spares=1)
    is_settled = asyncio.Event()

    async def settle() -> None:
        if "a defect of ours" not in caplog.text:
            raise KeyError("a defect of ours")
        is_settled.set()

    monkeypatch.setattr(kept, "_settle", settle)
    kept.start_keeping()
    await asyncio.wait_for(is_settled.wait(), timeout=5)
    await kept.close()


async def test_a_host_that_dies_while_the_mesh_forms_is_replaced_too(local_ray: RaySession, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, tp_size=3)) as (fleet, outlet):
        before, killed = outlet.meshes[0], []
        os.kill(before.hosts[2].info.pid, signal.SIGKILL)
        while not outlet.losses:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # the others are being formed again, or wait for the new one
        killed.append(fleet.replicas[0].hosts[0].info.pid)
        os.kill(killed[0], signal.SIGKILL)
        mesh = await outlet.next_mesh(0, before)
        assert not {host.info.pid for host in mesh.hosts} & {before.hosts[2].info.pid, *killed}
        assert await generate(mesh) == reference_ids(tiny_llama)


async def test_a_ray_that_does_not_answer_for_a_moment_is_asked_again(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, num_asked = ray.nodes, 0

    def nodes() -> list[dict[str, object]]:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            raise RaySystemError("the control store is restarting")
        return ask()

    async with running(fleet_config(tiny_llama)) as (fleet, outlet):
        before = outlet.meshes[0]
        monkeypatch.setattr(ray, "nodes", nodes)
        os.kill(before.hosts[0].info.pid, signal.SIGKILL)
        assert len((await outlet.next_mesh(0, before)).hosts) == 1
        assert not fleet.replicas[0].is_given_up
    assert num_asked > 1


async def test_a_mesh_that_cannot_be_formed_again_is_given_up_with_the_last_error(
    local_ray: RaySession, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = fleet_config(folder, tp_size=2, max_failed_forms=2)
    async with running(config) as (fleet, outlet):
        (folder / "model.safetensors").unlink()
        os.kill(outlet.meshes[0].hosts[1].info.pid, signal.SIGKILL)
        reason = await asyncio.wait_for(fleet.replicas[0].gave_up, timeout=60)
        assert reason.startswith("given up after 2 failures in a row, the last one: ")
        assert "safetensors" in reason
    assert await _all_cpus_are_free()


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (3, 1), (1, 1)])
async def test_a_replica_changes_its_shape_beside_the_old_mesh(
    local_ray: RaySession, tiny_llama: Path, tp_size: int, pp_size: int
) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2)) as (fleet, outlet):
        pids = _pids(fleet)
        await fleet.replicas[0].reshape(_shape(fleet, tp_size, pp_size))
        assert outlet.losses == [], "the old mesh served until the new one did"
        assert len(outlet.meshes[0].hosts) == tp_size * pp_size
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)
        assert await until_gone(pids) == []
    assert await _all_cpus_are_free()


async def test_a_replica_changes_its_shape_in_place_where_there_is_no_room_beside(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    others = placement_group([{"CPU": 1.0}] * (num_cpus - 3))
    ray.get(others.ready(), timeout=10)
    try:
        async with running(fleet_config(tiny_llama, tp_size=2)) as (fleet, outlet):
            for tp_size, pp_size in [(1, 2), (3, 1), (2, 1)]:
                await fleet.replicas[0].reshape(_shape(fleet, tp_size, pp_size))
                assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)
            assert len(outlet.losses) == 3
    finally:
        remove_placement_group(others)
    assert await _all_cpus_are_free()


async def test_a_shape_that_fails_to_form_leaves_the_old_mesh_running(local_ray: RaySession, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2)) as (fleet, outlet):
        before = outlet.meshes[0]
        with pytest.raises(FormError, match="stages"):
            await fleet.replicas[0].reshape(_shape(fleet, 1, 5))  # of 4 layers
        assert outlet.meshes[0] is before
        assert await generate(before) == reference_ids(tiny_llama)
    assert await _all_cpus_are_free()


async def test_a_shape_whose_leader_cannot_be_reached_leaves_the_old_mesh_running_and_kept(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    async with running(fleet_config(tiny_llama)) as (fleet, outlet):
        before = outlet.meshes[0]
        outlet.refuses = True
        with pytest.raises(FormError, match="refused"):
            await fleet.replicas[0].reshape(_shape(fleet, 2, 1))
        outlet.refuses = False
        assert outlet.meshes[0] is before
        assert await generate(before) == reference_ids(tiny_llama)
        os.kill(before.hosts[0].info.pid, signal.SIGKILL)
        assert len((await outlet.next_mesh(0, before)).hosts) == 1
    assert await _all_cpus_are_free()


@pytest.mark.parametrize("is_cut_off", [True, False])
async def test_a_mesh_that_cannot_be_reached_is_ended_unless_it_is_the_driver_that_is_cut_off(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, is_cut_off: bool
) -> None:
    asked = asyncio.Event()

    async def cluster_answers(timeout_s: float) -> bool:
        asked.set()
        return not is_cut_off

    monkeypatch.setattr("shardray.runtime.cluster.replica.cluster_answers", cluster_answers)
    async with running(fleet_config(tiny_llama)) as (fleet, outlet):
        before = outlet.meshes.pop(0)
        outlet.refuses = True
        fleet.replicas[0].link_lost()
        await asyncio.wait_for(asked.wait(), timeout=30)
        outlet.refuses = False
        async with asyncio.timeout(60):
            while 0 not in outlet.meshes:
                await asyncio.sleep(0.05)
        assert (outlet.meshes[0] is before) == is_cut_off
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)
    assert await _all_cpus_are_free()


async def test_a_replica_that_was_given_up_is_kept_again_in_the_next_shape(
    local_ray: RaySession, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    events: list[ClusterEvent] = []
    async with running(fleet_config(folder, max_failed_forms=2), events.append) as (fleet, outlet):
        (folder / "model.safetensors").rename(tmp_path / "weights")
        os.kill(outlet.meshes[0].hosts[0].info.pid, signal.SIGKILL)
        await asyncio.wait_for(asyncio.shield(fleet.replicas[0].gave_up), timeout=60)
        with pytest.raises(FormError, match="safetensors"):
            await fleet.replicas[0].reshape(_shape(fleet, 2, 1))
        assert fleet.replicas[0].is_given_up
        assert isinstance(events[-1], ReplicaGaveUp)
        (tmp_path / "weights").rename(folder / "model.safetensors")
        await check_room(fleet, _shape(fleet, 2, 1), 1)
        await fleet.replicas[0].reshape(_shape(fleet, 2, 1))
        mesh = outlet.meshes[0]
        os.kill(mesh.hosts[1].info.pid, signal.SIGKILL)
        assert await generate(await outlet.next_mesh(0, mesh)) == reference_ids(tiny_llama)
    assert await _all_cpus_are_free()


async def test_a_shape_is_gone_back_to_even_if_that_takes_several_forms(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2)) as (fleet, outlet):
        replica, before = fleet.replicas[0], outlet.meshes[0]

        async def fails(recipe: MeshRecipe) -> None:
            raise FormError("a host died")

        monkeypatch.setattr(replica, "reshape", fails)
        await replica.reshape_at_last(_shape(fleet, 1, 2))
        assert outlet.meshes[0] is not before
        assert [(shard.stage, shard.tp_rank) for shard in outlet.meshes[0].shards] == [(0, 0), (1, 0)]
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)
    assert await _all_cpus_are_free()


async def test_a_replica_that_is_removed_while_it_grows_back_leaves_nothing(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(fleet_config(tiny_llama)) as (fleet, _):
        replica = fleet.replicas[0]
        let_go, is_there = replica._slot.let_go, asyncio.Event()

        async def let_go_at_length() -> None:
            monkeypatch.setattr(replica._slot, "let_go", let_go)
            is_there.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(replica._slot, "let_go", let_go_at_length)
        replica.recipe = _shape(fleet, 2, 1)  # as if it ran on fewer hosts than it was to
        replica._growing = asyncio.create_task(replica._grow_back())
        await asyncio.wait_for(is_there.wait(), timeout=20)
        await fleet.remove(replica)
        assert await _all_cpus_are_free()


def _shape(fleet: ReplicaSet, tp_size: int, pp_size: int) -> MeshRecipe:
    config = fleet.recipe.config
    parallel = dataclasses.replace(
        config.parallel, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, stage_layers=None
    )
    return MeshRecipe(dataclasses.replace(config, parallel=parallel), fleet.recipe.model_dir)


async def _idle_hosts(fleet: ReplicaSet, num_hosts: int, timeout_s: float = 30.0) -> list[RemoteHost]:
    async with asyncio.timeout(timeout_s):
        while len(fleet.pool.idle) != num_hosts:
            await asyncio.sleep(0.05)
    return fleet.pool.idle


async def test_a_fleet_that_cannot_be_placed_leaves_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(PlacementError, match=f"needs {num_cpus + 1} CPU bundles, the cluster has {num_cpus} on 1 node"):
        await ReplicaSet.start(fleet_config(tiny_llama, tp_size=num_cpus + 1), tiny_llama, RecordingOutlet())
    assert await _all_cpus_are_free()


async def test_a_start_that_is_cancelled_leaves_nothing(local_ray: RaySession, tiny_llama: Path) -> None:
    before = descendants()
    starting = asyncio.create_task(ReplicaSet.start(fleet_config(tiny_llama, tp_size=2), tiny_llama, RecordingOutlet()))
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
