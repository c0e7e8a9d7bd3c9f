"""A mesh that breaks ends with one line that says who, where, when; the hosts that still work can be used again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shardray.runtime.cluster import supervise
from shardray.runtime.cluster.form import FormedMesh, dissolve
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.reports import FailureKind
from shardray.runtime.cluster.supervise import MeshFailure, MeshWatch
from tests.cluster.fleets import fleet_config, form_from, generate, hosts_of, until_gone

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


@asynccontextmanager
async def _watched_mesh(folder: Path, tp_size: int, pp_size: int, step_timeout_s: float) -> AsyncIterator[FormedMesh]:
    config = fleet_config(folder, tp_size, pp_size, step_timeout_s=step_timeout_s)
    async with hosts_of(config) as hosts:
        yield await form_from(hosts, config)


async def _break(mesh: FormedMesh, rank: int, signum: signal.Signals, step_timeout_s: float, busy: bool) -> MeshFailure:
    """Send ``signum`` to one rank, in the middle of a decode if ``busy``, and return what the watch finds."""
    watch = MeshWatch(mesh, step_timeout_s)
    began = asyncio.Event()
    request = asyncio.create_task(generate(mesh, num_tokens=480, began=began)) if busy else None
    await (asyncio.sleep(0.15) if request is None else asyncio.wait_for(began.wait(), timeout=20))
    os.kill(mesh.hosts[rank].info.pid, signum)
    failure = await asyncio.wait_for(watch.failure(), timeout=15)
    if request is not None:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    assert failure is not None
    return failure


async def test_a_killed_leader_is_named_and_the_others_form_again(local_ray: RaySession, tiny_llama: Path) -> None:
    async with _watched_mesh(tiny_llama, tp_size=2, pp_size=2, step_timeout_s=30) as mesh:
        began = time.monotonic()
        failure = await _break(mesh, 0, signal.SIGKILL, step_timeout_s=30, busy=True)
        assert time.monotonic() - began < 5, "a death is not waited for until a step's deadline"
        info = mesh.hosts[0].info
        assert failure.reason.startswith(f"stage 0 tensor rank 0 (host {info.host} pid {info.pid}) died")
        assert "\n" not in failure.reason
        assert [end.kind for end in failure.failures].count(FailureKind.DIED) == 1
        assert {host.info.pid for host in failure.survivors} == {h.info.pid for h in mesh.hosts} - {info.pid}
        again = await form_from(failure.survivors[:2], fleet_config(tiny_llama, tp_size=2))
        watch = MeshWatch(again, step_timeout_s=30)
        assert len(await generate(again)) == 24
        await watch.stop(timeout_s=5)


async def test_a_rank_that_hangs_in_a_step_is_named_with_step_and_collective(
    local_ray: RaySession, tiny_llama: Path
) -> None:
    async with _watched_mesh(tiny_llama, tp_size=2, pp_size=1, step_timeout_s=1.5) as mesh:
        info = mesh.hosts[1].info
        failure = await _break(mesh, 1, signal.SIGSTOP, step_timeout_s=1.5, busy=True)
        cause = failure.failures[0]
        assert (cause.kind, cause.rank, cause.pid) == (FailureKind.HUNG, 1, info.pid)
        assert cause.step is not None
        assert "tensor group" in failure.reason
        assert [host.info.pid for host in failure.survivors] == [mesh.hosts[0].info.pid]
        assert await until_gone([info.pid]) == []


async def test_a_rank_that_hangs_while_idle_is_found_by_its_heartbeat(local_ray: RaySession, tiny_llama: Path) -> None:
    async with _watched_mesh(tiny_llama, tp_size=2, pp_size=1, step_timeout_s=1.0) as mesh:
        failure = await _break(mesh, 0, signal.SIGSTOP, step_timeout_s=1.0, busy=False)
        assert failure.failures[0].kind is FailureKind.HUNG
        assert failure.failures[0].rank == 0
        assert "does not answer" in failure.reason


async def test_a_failure_that_a_stop_meets_is_over_before_the_hosts_are_used_again(
    local_ray: RaySession, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dissolve_slowly(hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
        await asyncio.sleep(1.0)
        return await dissolve(hosts)

    monkeypatch.setattr(supervise, "dissolve", dissolve_slowly)
    async with _watched_mesh(tiny_llama, tp_size=2, pp_size=1, step_timeout_s=30) as mesh:
        watch = MeshWatch(mesh, step_timeout_s=30)
        failing = asyncio.create_task(watch.failure())
        os.kill(mesh.hosts[1].info.pid, signal.SIGKILL)
        while not watch.is_ending:
            await asyncio.sleep(0.01)
        await watch.stop(timeout_s=5)
        assert await dissolve(mesh.hosts) == [mesh.hosts[0]]
        again = await form_from(mesh.hosts[:1], fleet_config(tiny_llama))
        next_watch = MeshWatch(again, step_timeout_s=30)
        await failing
        assert len(await generate(again)) == 24
        await next_watch.stop(timeout_s=5)
