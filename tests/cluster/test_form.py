"""Form takes live hosts to a mesh, and back to live hosts when it fails: one operation for start, heal and scale."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from shardray.runtime.cluster.errors import FormError
from shardray.runtime.cluster.form import MeshRecipe, dissolve
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.supervise import MeshWatch
from shardray.runtime.cluster.takeover import take_over
from shardray.runtime.config import Config
from tests.cluster.fleets import fleet_config, form_from, generate, hosts_of, reference_ids, until_gone

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


async def test_the_same_hosts_form_one_mesh_after_another_in_any_shape(local_ray: RaySession, tiny_llama: Path) -> None:
    expected = reference_ids(tiny_llama)
    async with hosts_of(fleet_config(tiny_llama, tp_size=3)) as hosts:
        pids = {host.info.pid for host in hosts}
        for tp_size, pp_size in ((3, 1), (1, 3), (2, 1)):
            used = hosts[: tp_size * pp_size]
            mesh = await form_from(used, fleet_config(tiny_llama, tp_size, pp_size))
            assert [(shard.stage, shard.tp_rank) for shard in mesh.shards] == [
                (stage, tp_rank) for stage in range(pp_size) for tp_rank in range(tp_size)
            ]
            assert {shard.pid for shard in mesh.shards} <= pids
            watch = MeshWatch(mesh, step_timeout_s=30)
            assert await generate(mesh) == expected
            await watch.stop(timeout_s=5)
            assert await watch.failure() is None
            assert await dissolve(used) == used


async def test_a_form_that_fails_names_the_rank_and_frees_the_hosts(local_ray: RaySession, tiny_llama: Path) -> None:
    empty = tiny_llama.parent / "empty"
    empty.mkdir(exist_ok=True)
    async with hosts_of(fleet_config(tiny_llama, tp_size=2)) as hosts:
        with pytest.raises(FormError) as failure:
            await form_from(hosts, fleet_config(tiny_llama, tp_size=2), folder=empty)
        reason = str(failure.value)
        assert "stage 0 tensor rank 0" in reason
        assert f"pid {hosts[0].info.pid}" in reason or f"pid {hosts[1].info.pid}" in reason
        assert "config.json" in reason
        assert "(and on 1 more)" in reason, "the same cause on both ranks is told once"
        assert "\n" not in reason
        # Where the driver's folder does not exist, hosts find the model by its source.
        mesh = await form_from(hosts, fleet_config(tiny_llama, tp_size=2), folder=Path("/not/on/this/node"))
        assert {shard.pid for shard in mesh.shards} == {host.info.pid for host in hosts}


async def test_a_host_that_dies_while_forming_is_named(local_ray: RaySession, tiny_llama: Path) -> None:
    async with hosts_of(fleet_config(tiny_llama, tp_size=2)) as hosts:
        victim = hosts[1].info
        forming = asyncio.create_task(form_from(hosts, fleet_config(tiny_llama, tp_size=2)))
        await asyncio.sleep(0.3)
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(FormError, match=rf"pid {victim.pid}\)?.* died"):
            await forming


async def test_a_host_that_stands_still_is_named_at_the_deadline(local_ray: RaySession, tiny_llama: Path) -> None:
    config = fleet_config(tiny_llama, tp_size=2, form_timeout_s=2.5)
    async with hosts_of(config) as hosts:
        await form_then_dissolve(hosts, fleet_config(tiny_llama, tp_size=2))  # the runtime is imported then
        victim = hosts[1].info
        os.kill(victim.pid, signal.SIGSTOP)
        with pytest.raises(FormError, match=rf"pid {victim.pid}.*within 2.5 s"):
            await form_from(hosts, config)
        assert await until_gone([victim.pid]) == [], "a host that does not answer is ended"


async def test_a_host_that_stops_answering_is_named_long_before_the_deadline(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fleet_config(tiny_llama, tp_size=2, form_timeout_s=300, step_timeout_s=1.0)
    async with hosts_of(config) as hosts:
        await form_then_dissolve(hosts, config)  # the runtime is imported then
        for name in ("_SHORTEST_SILENCE_S", "_IMPORT_SILENCE_S"):
            monkeypatch.setattr(f"shardray.runtime.cluster.form.{name}", 1.0)
        victim = hosts[1].info
        os.kill(victim.pid, signal.SIGSTOP)
        with pytest.raises(FormError, match=rf"pid {victim.pid} did not answer progress within 1 s") as failure:
            await asyncio.wait_for(form_from(hosts, config), timeout=30)
        assert failure.value.survivors == (hosts[0],)
        assert await until_gone([victim.pid]) == []


async def test_a_host_that_dies_while_another_driver_takes_over_is_done_without(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    config = fleet_config(tiny_llama, tp_size=2)
    async with hosts_of(config) as hosts:
        for host in hosts:
            assert await host.renew("the driver before", 60.0)
        claiming = asyncio.create_task(take_over("the next driver", MeshRecipe(config, str(tiny_llama)), False))
        await asyncio.sleep(1.0)  # it waits until the other has been silent for long
        os.kill(hosts[0].info.pid, signal.SIGKILL)
        found = await claiming
        assert [host.info.pid for host in found.idle] == [hosts[1].info.pid]
        assert found.meshes == ()


async def test_a_mesh_is_taken_over_if_it_runs_with_the_same_settings_on_the_same_devices(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    config = fleet_config(tiny_llama, tp_size=2)
    same = MeshRecipe(config, str(tiny_llama))
    changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, share_weights=False))
    async with hosts_of(config) as hosts:
        mesh = await form_from(hosts, config)
        watch, pids = MeshWatch(mesh, step_timeout_s=30), {host.info.pid for host in hosts}
        assert await generate(mesh) == reference_ids(tiny_llama)
        [(taken, _)] = (await take_over("a driver", same, on_gpus=False)).meshes
        assert await generate(taken) == reference_ids(tiny_llama)
        found = await take_over("a driver", dataclasses.replace(same, config=changed), on_gpus=False)
        assert (found.meshes, {host.info.pid for host in found.idle}) == ((), pids)
        found = await take_over("a driver", same, on_gpus=True)
        assert (found.meshes, found.idle) == ((), ())
        assert await until_gone(list(pids)) == []
        await watch.stop(timeout_s=1)


async def form_then_dissolve(hosts: Sequence[RemoteHost], config: Config) -> None:
    await form_from(hosts, config)
    assert await dissolve(hosts) == list(hosts)
