"""Every command of the operator's guide, as it stands there, and what is rendered, on a real Ray of several nodes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardray.runtime.client import Client
from shardray.runtime.deploy.kuberay import manifests
from shardray.runtime.deploy.names import CONFIG_DIR, CONFIG_FILE, RAYLET_PORT, RenderOptions
from shardray.runtime.model.sources import resolve_model
from tests.cluster.fleets import several_nodes
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "operators-guide.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Programs of blocks that begin with `$`: what they do is not to be done to the machine that tests run on.
_ELSEWHERE = {"python3", "/opt/shardray/bin/pip", "docker", "export", "ray", "cp", "systemctl", "journalctl", "kubectl"}
_CLIENTS = {"status", "generate", "scale", "reload", "restart", "drain", "trace"}


def blocks(language: str) -> list[str]:
    found = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """What is run, in order."""
    return [line for block in blocks("sh") for line in block.splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with several_nodes(2, num_cpus=3) as nodes:
        yield nodes.address


class Shell:
    """Runs lines as an operator's shell would, on ports that are free."""

    def __init__(self, folder: Path, ray_address: str) -> None:
        self._folder = folder
        self._ports = dict(zip(("50051", "9464"), map(str, free_ports(2)), strict=True))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_address}
        self._servers: list[subprocess.Popen[str]] = []
        self.address = f"127.0.0.1:{self._ports['50051']}"

    def with_free_ports(self, text: str) -> str:
        for usual, port in self._ports.items():
            text = text.replace(usual, port)
        return text

    def translate(self, line: str) -> str:
        program, command, *_ = line.split()
        line = self.with_free_ports(line)
        if program == "shardray" and command in _CLIENTS:
            return line.replace(command, f"{command} --server {self.address}", 1)
        return line

    def run(self, line: str) -> None:
        """A line to its end, or a server in the background until it serves."""
        translated = self.translate(line)
        if line.endswith("&"):
            command = ["bash", "-c", f"exec {translated.removesuffix('&')}"]
            self._servers.append(subprocess.Popen(command, cwd=self._folder, env=self._env, text=True))
            with Client(self.address) as client:
                client.wait_ready(120)
            return
        done = subprocess.run(
            ["bash", "-c", translated],
            cwd=self._folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        if "drain" in line:
            assert self._servers[-1].wait(timeout=60) == 0

    def close(self) -> None:
        for server in self._servers:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=60)


@contextlib.contextmanager
def process(words: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Afterwards, that SIGTERM ends it."""
    started = subprocess.Popen([sys.executable, "-m", *_MODULES[words[0]], *words[1:]], env=env, text=True)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(timeout=60)


_MODULES = {"shardray": ["shardray"], "ray": ["ray.scripts.scripts"]}
_FRONT = """
model: {source: smollm2-135m, max_model_len: 1024}
parallel: {tensor_parallel_size: 2}
engine: {device: cpu, kv_memory_bytes: 32MiB}
grpc: {listen: "0.0.0.0:PORT", allow_unauthenticated: true}
"""


@pytest.mark.slow
@pytest.mark.integration
def test_the_commands_of_the_front_pod_join_a_cluster_and_serve(ray_address: str, tmp_path: Path) -> None:
    """What its containers run, as processes; only addresses and the path of the file are others."""
    resolve_model("smollm2-135m")
    port, raylet_port = free_ports(2)
    path = tmp_path / CONFIG_FILE
    path.write_text(_FRONT.replace("PORT", str(port)), encoding="utf-8")
    options = RenderOptions()
    [pod] = [made["spec"]["template"]["spec"] for made in manifests(path, options) if made["kind"] == "Deployment"]

    def words(container: dict[str, Any]) -> list[str]:
        given = [*container["command"], *container["args"]]
        return [
            word.replace(options.head_address, ray_address)
            .replace(CONFIG_DIR, str(tmp_path))
            .replace(f"={RAYLET_PORT}", f"={raylet_port}")
            for word in given
        ]

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    weights, beside = pod["initContainers"]
    subprocess.run([sys.executable, "-m", *words(weights)], env=env, timeout=120, check=True)
    with process(words(beside), env) as raylet:
        with process(words(pod["containers"][0]), env) as driver, Client(f"127.0.0.1:{port}") as client:
            client.wait_ready(120)
            assert client.generate("The capital of France is", max_tokens=8, temperature=0).text.startswith(" Paris")
            assert raylet.poll() is None
        assert driver.returncode == 0


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_every_command_of_the_guide_does_what_it_says(ray_address: str, tmp_path: Path) -> None:
    resolve_model("smollm2-135m")
    shell = Shell(tmp_path, ray_address)
    [settings] = blocks("yaml")
    (tmp_path / "my-serving.yaml").write_text(shell.with_free_ports(settings), encoding="utf-8")
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    try:
        for line in commands():
            shell.run(line)
    finally:
        shell.close()
    assert "shardray:replicas" in (tmp_path / "metrics.txt").read_text(encoding="utf-8")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_every_command_of_the_guide_is_run_or_belongs_to_another_machine() -> None:
    elsewhere = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in elsewhere)
    assert {line.split()[1] for line in elsewhere} <= _ELSEWHERE
    assert {name for name, _ in _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))} == {"sh", "console", "yaml"}
