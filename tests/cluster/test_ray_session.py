"""A connection to Ray ends without a trace, in whichever way its process ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.config import RaySettings
from tests.cluster.fleets import until_gone

pytestmark = pytest.mark.integration
_REPOSITORY = Path(__file__).parents[2]
_OPEN_AND_WAIT = """
import time
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.config import RaySettings
session = RaySession(RaySettings(), num_hosts=2)
print("open", flush=True)
try:
    time.sleep(60)
finally:
    session.stop()
"""


# Ray's agents try for a minute to report their killed parents before they end themselves.
_SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def _processes_of(pid: int, but: tuple[str, ...]) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if not " ".join(child.cmdline()).startswith(but)]


@pytest.mark.asyncio
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
async def test_a_local_ray_ends_with_its_driver(signum: signal.Signals) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", _OPEN_AND_WAIT], cwd=_REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"open\n"
    processes = _processes_of(driver.pid, but=_SLOW_TO_LEAVE if signum is signal.SIGKILL else ())
    assert len(processes) > 2
    driver.send_signal(signum)
    driver.wait(timeout=20)
    driver.stdout.close()
    assert await until_gone(processes, timeout_s=20) == []


def test_joining_where_no_ray_runs_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
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
