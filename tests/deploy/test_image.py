"""The image as deploy/Containerfile builds it, and a fleet of its containers from rendered manifests.

Skipped where nothing builds containers. ``IMAGE_BUILD_OPTIONS`` has further options for the build, such as a mirror's
``--build-arg=PYTHON_IMAGE=...``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from shardray import LLM, SamplingParams, __version__
from shardray.runtime.deploy.kuberay import render
from shardray.runtime.deploy.names import HOME_DIR, RenderOptions
from shardray.runtime.model.sources import resolve_model
from tests.certificates import make_tls
from tests.deploy.containerfile import FILE, ROOT
from tests.deploy.kubelet import Kubelet, Objects, Pod, find_engine, kuberay_pods, random_token

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(900)]

SERVING = ROOT / "deploy" / "examples" / "kubernetes.yaml"
NAME = "image-test"
IMAGE = f"localhost/shardray:{__version__}-test"
PROMPT = "The capital of France is"
NUM_TOKENS = 600
LEASE_S = 20
_ALONE = """
model: {source: /model, max_model_len: 1024}
parallel: {tensor_parallel_size: 2}
engine: {device: cpu, kv_memory_bytes: 64MiB}
grpc: {listen: "127.0.0.1:50051"}
"""
_CLIENT_TOKEN = "token-of-a-client-01"


class Fleet(NamedTuple):
    kubelet: Kubelet
    head: Pod
    workers: list[Pod]
    front: Pod
    files: Path  # of clients

    def shardray(self, command: str, *words: str) -> subprocess.Popen[str]:
        access = ["--server", f"{NAME}:50051", "--ca", "/files/ca.pem", "--token-file", "/files/token"]
        return self.kubelet.client("shardray", command, *words, *access, image=IMAGE, files=self.files)

    def replicas(self) -> list[dict[str, Any]]:
        output, _ = self.shardray("status", "--json").communicate(timeout=60)
        found: list[dict[str, Any]] = json.loads(output)["replicas"]
        return found

    def settle(self) -> None:
        """Start again what has ended, as Kubernetes would, and wait until every replica serves."""
        for worker in self.workers:
            if not self.kubelet.is_running(worker, "ray-worker"):
                self.kubelet.restart(worker, "ray-worker")
        give_up = time.monotonic() + 120
        while {replica["state"] for replica in self.replicas()} != {"ready"}:
            assert time.monotonic() < give_up, self.replicas()
            time.sleep(1)

    def busy_replica(self) -> dict[str, Any]:
        [found] = [replica for replica in self.replicas() if replica["num_live_requests"]]
        return found

    def worker_of(self, replica: dict[str, Any]) -> Pod:
        """Where its leader is."""
        [found] = [worker for worker in self.workers if worker.address == replica["shards"][0]["host"]]
        return found

    def stream(self) -> subprocess.Popen[str]:
        return self.shardray(
            "generate", PROMPT, "--json", "--temperature=0", f"--max-tokens={NUM_TOKENS}", "--ignore-eos"
        )


@pytest.fixture(scope="module")
def engine() -> str:
    found = find_engine()
    if found is None:
        pytest.skip("neither podman nor docker runs here")
    if os.geteuid() != 0:
        pytest.skip("files of secrets belong to the pods' group: only root gives files away")
    options = shlex.split(os.environ.get("IMAGE_BUILD_OPTIONS", ""))
    build = [found, "build", "-f", str(FILE), "--build-arg=VARIANT=cpu", "-t", IMAGE, *options, str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def fleet(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """What `shardray render kuberay` makes of the example, weights on a claim."""
    folder = tmp_path_factory.mktemp("pods")
    options = RenderOptions(name=NAME, image=IMAGE, model_claim="weights", overrides=(f"cluster.lease_s={LEASE_S}",))
    made = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(render(SERVING, options))}
    kubelet = Kubelet(engine, folder, _objects(folder, made["ConfigMap"]))
    try:
        head, *workers = [kubelet.start(*pod) for pod in kuberay_pods(made["RayCluster"])]
        for pod in (head, *workers):
            kubelet.wait_for(pod, pod.spec["containers"][0], "startupProbe", "readinessProbe")
        front = kubelet.start(
            f"{NAME}-front", made["Deployment"]["spec"]["template"]["spec"], made["Service"]["metadata"]["name"]
        )
        kubelet.wait_for(front, front.spec["containers"][0], "startupProbe", "readinessProbe", "livenessProbe")
        yield Fleet(kubelet, head, workers, front, folder / "client")
    finally:
        kubelet.close()


@pytest.fixture(scope="module")
def expected_ids() -> list[int]:
    """From two ranks without Ray: in 16 bits as many promise the same bits."""
    with LLM("smollm2-135m", max_model_len=4096, tensor_parallel_size=2) as llm:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return list(llm.generate(PROMPT, params)[0].token_ids)


def test_a_container_of_its_own_serves_without_any_right(engine: str, tmp_path: Path, expected_ids: list[int]) -> None:
    """As its file says how to run it; nobody's root, and only /tmp and the home can be written to."""
    model = resolve_model("smollm2-135m")
    (tmp_path / "serving.yaml").write_text(_ALONE, encoding="utf-8")
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    files = [f"{tmp_path}/serving.yaml:/serving.yaml:ro", f"{model}:/model:ro", f"{tmp_path}/home:{HOME_DIR}"]
    rights = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    options = [f"--name={NAME}-alone", "--init", "--shm-size=1g", *rights, *(f"-v={file}" for file in files)]

    few = 24

    def run(*words: str, check: bool = True) -> str:
        done = subprocess.run([engine, *words], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    run("run", "-d", *options, IMAGE, "shardray", "serve", "/serving.yaml")
    try:
        ask = [
            "exec",
            f"{NAME}-alone",
            "shardray",
            "generate",
            PROMPT,
            "--json",
            f"--max-tokens={few}",
            "--temperature=0",
        ]
        give_up = time.monotonic() + 120
        while not (said := run(*ask, check=False)):
            assert time.monotonic() < give_up, run("logs", f"{NAME}-alone")
            time.sleep(0.5)
        assert ids_of(said) == expected_ids[:few]
        run("stop", "--time=60", f"{NAME}-alone")
        assert run("inspect", "-f", "{{.State.ExitCode}}", f"{NAME}-alone").strip() == "0"
    finally:
        run("rm", "-f", f"{NAME}-alone", check=False)


def test_pods_answer_with_the_tokens_of_an_engine_in_process(fleet: Fleet, expected_ids: list[int]) -> None:
    assert token_ids(fleet.stream()) == expected_ids


def test_a_worker_that_is_killed_costs_no_token(fleet: Fleet, expected_ids: list[int]) -> None:
    client = fleet.stream()
    before = first_ids(client)
    worker = fleet.worker_of(fleet.busy_replica())
    fleet.kubelet.kill(worker, "ray-worker")
    assert before + token_ids(client) == expected_ids
    [failed] = [replica["last_failure"] for replica in fleet.replicas() if "last_failure" in replica]
    assert failed["host"] == worker.address
    fleet.settle()


@pytest.mark.skipif(shutil.which("iptables") is None, reason="nothing here can drop packets")
def test_a_worker_that_is_cut_off_costs_no_token_and_takes_nobody_along(fleet: Fleet, expected_ids: list[int]) -> None:
    """Its hosts take the driver for gone. When they are heard again, their lease is over, and that of others is not."""
    client = fleet.stream()
    before = first_ids(client)
    replica = fleet.busy_replica()
    [other] = [other for other in fleet.replicas() if other["replica_id"] != replica["replica_id"]]
    cut_off_s = time.monotonic()
    with fleet.kubelet.cut_off(fleet.worker_of(replica)):
        assert before + token_ids(client) == expected_ids
        time.sleep(max(0.0, cut_off_s + LEASE_S + 10 - time.monotonic()))
    fleet.settle()
    time.sleep(5)
    [same] = [same for same in fleet.replicas() if same["replica_id"] == other["replica_id"]]
    assert (same["state"], same["num_recoveries"]) == ("ready", other["num_recoveries"])


def test_a_driver_that_is_killed_goes_on_from_its_journal(fleet: Fleet, expected_ids: list[int]) -> None:
    client = fleet.stream()
    before = first_ids(client)
    fleet.kubelet.kill(fleet.front, "driver")
    fleet.kubelet.restart(fleet.front, "driver")
    assert before + token_ids(client) == expected_ids


def test_a_front_that_is_deleted_ends_what_runs(fleet: Fleet, expected_ids: list[int]) -> None:
    client = fleet.stream()
    before = first_ids(client)
    fleet.kubelet.delete(fleet.front)
    assert before + token_ids(client) == expected_ids
    assert fleet.kubelet.exit_code(fleet.front, "driver") == 0


def token_ids(client: subprocess.Popen[str]) -> list[int]:
    """All that the client still prints; it has to end well."""
    output, _ = client.communicate(timeout=240)
    assert client.returncode == 0, output
    return ids_of(output)


def ids_of(output: str) -> list[int]:
    return [token_id for line in output.splitlines() for token_id in json.loads(line)["token_ids"]]


def first_ids(client: subprocess.Popen[str]) -> list[int]:
    """Of a stream that has begun, and has most of its tokens before it."""
    assert client.stdout is not None
    found: list[int] = []
    while len(found) < 20:
        line = client.stdout.readline()
        assert line.startswith("{"), line + client.stdout.read()
        found += ids_of(line)
    return found


def _objects(folder: Path, serving: dict[str, Any]) -> Objects:
    """What an operator makes before: secrets, the journal's volume, and one with weights."""
    tls = make_tls(folder / "client", NAME)
    (folder / "client" / "token").write_text(_CLIENT_TOKEN, encoding="utf-8")
    claims = {"weights": folder / "weights", f"{NAME}-journal": folder / "journal"}
    for claim in claims.values():
        claim.mkdir()
        claim.chmod(0o777)
    model = resolve_model("smollm2-135m")
    shutil.copytree(model, claims["weights"] / "shardray" / "models" / model.name)
    secrets = {
        f"{NAME}-ray": {"token": random_token()},
        f"{NAME}-grpc-tls": {"server.pem": Path(tls.cert).read_text(), "server-key.pem": Path(tls.key).read_text()},
        f"{NAME}-grpc-tokens": {"tokens": f"client inference,control {_CLIENT_TOKEN}\n"},
    }
    return Objects(secrets, claims, {serving["metadata"]["name"]: serving["data"]})
