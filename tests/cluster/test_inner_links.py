"""The links inside a fleet of real hosts: where they listen, who gets in, and what strangers can do to them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ray._private.worker import global_worker

from shardray.parallel.tls import TlsError, TlsFiles
from shardray.runtime.cluster.errors import FormError
from shardray.runtime.cluster.form import dissolve
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.cluster.supervise import MeshWatch
from shardray.runtime.config import TlsSettings
from shardray.runtime.driver.link import LinkError
from tests.certificates import lets_in, make_tls, signed_by
from tests.cluster.fleets import RecordingOutlet, fleet_config, form_from, generate, hosts_of, reference_ids, running
from tests.strangers import Address, besieged, listeners_of

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("tls"))


def settings_of(files: TlsFiles) -> TlsSettings:
    return TlsSettings(**asdict(files))


def listeners(hosts: list[RemoteHost]) -> set[Address]:
    return listeners_of([host.info.pid for host in hosts])


def logs_of(hosts: list[RemoteHost]) -> str:
    """What the hosts' processes have written to stderr."""
    folder = Path(global_worker.node.get_logs_dir_path())
    return "".join(path.read_text() for host in hosts for path in folder.glob(f"worker-*-{host.info.pid}.err"))


async def told_of_strangers(hosts: list[RemoteHost]) -> None:
    """The leader looks for them once a second; a mesh may answer and end before it has looked twice."""
    async with asyncio.timeout(20):
        while "refused a driver connection from 127.0.0." not in logs_of(hosts):
            await asyncio.sleep(0.1)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_a_formed_mesh_listens_on_one_port_of_the_address_given(local_ray: RaySession, tiny_llama: Path) -> None:
    config = fleet_config(tiny_llama, tp_size=2)
    async with hosts_of(config) as hosts:
        rays_own = listeners(hosts)
        mesh = await form_from(hosts, config)
        assert listeners(hosts) - rays_own == {("127.0.0.1", port_of(mesh.address))}
        watch = MeshWatch(mesh, step_timeout_s=30)
        await generate(mesh)
        assert listeners(hosts) - rays_own == {("127.0.0.1", port_of(mesh.address))}
        await watch.stop(timeout_s=5)
        await dissolve(hosts)
        assert listeners(hosts) - rays_own == set()


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
async def test_a_mesh_forms_and_answers_while_strangers_call_at_every_port(
    local_ray: RaySession, tiny_llama: Path, tls: TlsFiles, has_tls: bool
) -> None:
    config = fleet_config(tiny_llama, tp_size=2, tls=settings_of(tls) if has_tls else None)
    expected = reference_ids(tiny_llama, num_tokens=200)
    async with hosts_of(config) as hosts:
        await dissolve((await form_from(hosts, config)).hosts)  # the runtime is imported then
        rays_own = listeners(hosts)
        with besieged(lambda: listeners(hosts) - rays_own) as calls:
            for _ in range(2):
                mesh = await form_from(hosts, config)
                watch = MeshWatch(mesh, step_timeout_s=30)
                async with asyncio.timeout(60):
                    while True:
                        assert await generate(mesh, num_tokens=200, timeout_s=100) == expected
                        if max(calls.values(), default=0) >= 200:
                            break
                await told_of_strangers(hosts)
                await watch.stop(timeout_s=5)
                await dissolve(hosts)
        told = logs_of(hosts)
        assert told.count("refused") < 200
        assert mesh.credentials.secret not in told


async def test_a_fleet_with_tls_answers_and_lets_no_one_else_in(
    local_ray: RaySession, tiny_llama: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    other = make_tls(tmp_path / "other")
    async with running(fleet_config(tiny_llama, tp_size=2, pp_size=2, tls=settings_of(tls))) as (fleet, outlet):
        mesh = outlet.meshes[0]
        port = port_of(mesh.address)
        assert await generate(mesh) == reference_ids(tiny_llama)
        assert lets_in(port, tls.ca, tls)
        assert not lets_in(port, tls.ca, None)
        assert not lets_in(port, tls.ca, other)
        for files in (None, other, signed_by(tls, other)):
            stranger = replace(mesh, credentials=replace(mesh.credentials, tls=files))
            with pytest.raises(LinkError):
                await generate(stranger)
        assert await generate(mesh) == reference_ids(tiny_llama)
        told = logs_of(fleet.replicas[0].hosts)
        assert "peer did not return a certificate" in told
        assert "unable to get local issuer certificate" in told


async def test_certificates_that_cannot_be_used_are_named_before_anything_is_placed(
    tiny_llama: Path, tls: TlsFiles
) -> None:
    config = fleet_config(tiny_llama, tls=settings_of(replace(tls, key="/nowhere/key.pem")))
    with pytest.raises(TlsError, match=r"cluster\.tls\.key: /nowhere/key\.pem cannot be read: No such file"):
        await ReplicaSet.start(config, tiny_llama, RecordingOutlet())


async def test_certificates_missing_on_a_host_are_named_with_it_and_no_group_is_opened(
    local_ray: RaySession, tiny_llama: Path, tls: TlsFiles
) -> None:
    config = fleet_config(tiny_llama, tp_size=2, tls=settings_of(replace(tls, cert="/nowhere/cert.pem")))
    async with hosts_of(config) as hosts:
        with pytest.raises(FormError, match=r"cluster\.tls\.cert: /nowhere/cert\.pem cannot be read") as failure:
            await form_from(hosts, config)
        assert f"pid {hosts[0].info.pid}" in str(failure.value) or f"pid {hosts[1].info.pid}" in str(failure.value)
        assert "\n" not in str(failure.value)
        assert len((await form_from(hosts, fleet_config(tiny_llama, tp_size=2))).hosts) == 2, "they can still be used"
