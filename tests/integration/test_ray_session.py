"""A connection to Ray ends without a trace, in whichever way its process ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.config import RaySettings

pytestmark = pytest.mark.integration
_REPOSITORY = Path(__file__).parents[2]
_OPEN_AND_WAIT = """
import time
from shardray.runtime.cluster.ray_token import choose_token
from shardray.runtime.config import RaySettings
choose_token(RaySettings())
from shardray.runtime.cluster.ray_session import RaySession
session = RaySession(RaySettings(), num_hosts=2)
print("ready", flush=True)
time.sleep(60)
"""
_START_A_FLEET = """
import asyncio
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.config import Config, ModelSettings
from tests.cluster.fleets import RecordingOutlet
config = Config(model=ModelSettings(source="/nowhere"))
print("ready", flush=True)
asyncio.run(ReplicaSet.start(config, "/nowhere", RecordingOutlet()))
"""
# Ray's agents try for a minute to report their killed parents before they end themselves.
_SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@contextlib.contextmanager
def _driver(script: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that runs ``script``, once that printed "ready", and the mark that all its descendants carry."""
    mark = uuid.uuid4().hex
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=_REPOSITORY,
        env={**inherited, "SHARDRAY_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"ready\n"
    try:
        yield driver, mark
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()


def _marked(mark: str) -> list[str]:
    """The command of every live process that carries ``mark``."""
    commands = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SHARDRAY_TEST_MARK") == mark:
                commands.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return commands


def _listening(driver: psutil.Process) -> dict[str, list[tuple[str, int]]]:
    """Addresses and ports of ``driver`` and all its descendants, by the name of the process."""
    found: dict[str, list[tuple[str, int]]] = {}
    for process in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(process.name(), []).append((connection.laddr.ip, connection.laddr.port))
    return found


def _left_of(mark: str, but: tuple[str, ...] = (), timeout_s: float = 20.0) -> list[str]:
    """What is still there after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while (left := [name for name in _marked(mark) if not name.startswith(but)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_local_ray_ends_when_its_driver_is_killed() -> None:
    with _driver(_OPEN_AND_WAIT) as (driver, mark):
        assert len(_marked(mark)) > 3
        driver.kill()
        driver.wait(timeout=10)
        assert _left_of(mark, but=_SLOW_TO_LEAVE) == []


def test_a_local_ray_is_closed_to_other_machines_and_to_other_users() -> None:
    """Whoever may speak to one of its ports runs code."""
    with _driver(_OPEN_AND_WAIT) as (driver, _):
        ports = _listening(psutil.Process(driver.pid))
        assert {"gcs_server", "raylet"} < ports.keys()
        addresses = {address for listening in ports.values() for address, _ in listening}
        assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
        [(_, gcs_port)] = ports["gcs_server"]
        with grpc.insecure_channel(f"127.0.0.1:{gcs_port}") as channel:
            check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            with pytest.raises(grpc.RpcError, match="Authentication token is missing or incorrect"):
                check_alive(b"", timeout=10)
            [gcs] = [child for child in psutil.Process(driver.pid).children() if child.name() == "gcs_server"]
            token = gcs.environ()["RAY_AUTH_TOKEN"]
            assert check_alive(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=10)


def test_ctrl_c_while_ray_starts_leaves_no_process() -> None:
    with _driver(_START_A_FLEET) as (driver, mark):
        time.sleep(1.0)
        driver.send_signal(signal.SIGINT)
        driver.wait(timeout=30)
        assert _left_of(mark) == []


def test_joining_where_no_ray_runs_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if any(process.name() == "gcs_server" for process in psutil.process_iter()):
        pytest.skip("a Ray of someone else's runs on this machine, and would be joined")
    with pytest.raises(ClusterError, match=r"ray\.address: auto: no running Ray found; start one \(ray start --head\)"):
        RaySession(RaySettings(address="auto"), num_hosts=1)


def test_an_unreachable_cluster_is_named() -> None:
    with pytest.raises(ClusterError, match=r"ray\.address: ray://127\.0\.0\.1:1: nothing answers there"):
        RaySession(RaySettings(address="ray://127.0.0.1:1"), num_hosts=1)


@pytest.mark.asyncio
async def test_signals_stay_with_the_program() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    session = await asyncio.to_thread(RaySession, RaySettings(), 1)
    after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    await asyncio.to_thread(session.stop)
    await asyncio.to_thread(session.stop)  # idempotent
    assert after == before
