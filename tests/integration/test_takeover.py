"""Drivers are killed and started again on a Ray that outlives them: the fleet is taken over, or gives its room back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from shardray.runtime.client import Client
from tests.cluster.fleets import PROMPT_IDS, make_tiny_llama, reference_ids, start_head

pytestmark = [pytest.mark.integration]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = start_head(num_cpus=4)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass
class Driver:
    process: subprocess.Popen[str]
    address: str
    pids: list[int]
    start_s: float

    def generate(self) -> list[int]:
        with Client(self.address, timeout_s=60) as client:
            return client.generate(list(PROMPT_IDS), temperature=0, max_tokens=24, ignore_eos=True).token_ids

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def driver(cluster: Cluster, folder: Path, namespace: str, **settings: Any) -> Iterator[Driver]:
    """A ``shardray serve`` that serves; ended with SIGTERM unless it was killed."""
    began = time.monotonic()
    process = _serve(cluster, folder, namespace, **settings)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if (event := json.loads(line))["event"] == "serving":
                pids = [shard["pid"] for shard in event["shards"]]
                yield Driver(process, event["address"], pids, time.monotonic() - began)
                break
        else:
            raise AssertionError(f"it did not serve: {process.stderr.read() if process.stderr else ''}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def _serve(cluster: Cluster, folder: Path, namespace: str, **settings: Any) -> subprocess.Popen[str]:
    options = {
        "model.source": folder, "model.dtype": "float32", "grpc.listen": "127.0.0.1:0", "ray.address": cluster.address,
        "ray.namespace": namespace, "engine.kv_memory_bytes": 4 << 20, **settings,
    }  # fmt: skip
    arguments = [text for key, value in options.items() for text in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "shardray", "serve", "--json", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RAY_AUTH_MODE": "token"},
    )  # fmt: skip


def _until_free(num_cpus: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while ray.available_resources().get("CPU") != num_cpus:
        assert time.monotonic() < deadline, f"still held: {ray.available_resources()}"
        time.sleep(0.2)


def _until_gone(pids: list[int]) -> list[int]:
    """Those that are left after a while."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_restarted_driver_takes_the_running_mesh_over(cluster: Cluster, tiny_llama: Path) -> None:
    shape = {"parallel.tensor_parallel_size": 2, "cluster.spares": 1}
    with driver(cluster, tiny_llama, "over", **shape) as first:
        expected = reference_ids(tiny_llama)
        assert first.generate() == expected
        first.kill()
        with driver(cluster, tiny_llama, "over", **shape) as second:
            assert second.pids == first.pids
            assert second.generate() == expected
            os.kill(second.pids[1], signal.SIGKILL)  # what was taken over is watched and healed like one's own
            assert second.generate() == expected
    _until_free(4, timeout_s=10)
    assert _until_gone(second.pids) == []


def test_a_fleet_with_other_settings_is_formed_afresh(cluster: Cluster, tiny_llama: Path) -> None:
    with driver(cluster, tiny_llama, "afresh") as first:
        first.kill()
        with driver(cluster, tiny_llama, "afresh", **{"engine.max_num_seqs": 3}) as second:
            assert second.generate() == reference_ids(tiny_llama)
    _until_free(4, timeout_s=10)


def test_a_second_driver_on_the_same_namespace_is_refused(cluster: Cluster, tiny_llama: Path) -> None:
    with driver(cluster, tiny_llama, "shared") as first:
        second = _serve(cluster, tiny_llama, "shared")
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another driver serves from this Ray namespace" in errors
        assert first.generate() == reference_ids(tiny_llama)


def test_a_driver_that_was_replaced_while_it_stood_still_ends_and_touches_nothing(
    cluster: Cluster, tiny_llama: Path
) -> None:
    with driver(cluster, tiny_llama, "replaced") as first:
        first.process.send_signal(signal.SIGSTOP)
        with driver(cluster, tiny_llama, "replaced") as second:
            assert second.pids == first.pids
            first.process.send_signal(signal.SIGCONT)
            _, errors = first.process.communicate(timeout=30)
            assert first.process.returncode == 1
            assert "another driver has taken the fleet over" in errors
            assert second.generate() == reference_ids(tiny_llama)
            assert all(psutil.pid_exists(pid) for pid in first.pids)
    _until_free(4, timeout_s=10)


def test_a_fleet_without_a_driver_gives_its_room_back_when_its_lease_is_over(
    cluster: Cluster, tiny_llama: Path
) -> None:
    with driver(cluster, tiny_llama, "lapsed", **{"cluster.lease_s": 4.0}) as only:
        only.kill()
        time.sleep(1)
        assert all(psutil.pid_exists(pid) for pid in only.pids)
        _until_free(4, timeout_s=15)
        assert _until_gone(only.pids) == []
