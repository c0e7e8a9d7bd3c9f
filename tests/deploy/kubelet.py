"""Runs the pods of rendered manifests as containers of this machine, by podman or docker.

Each pod has a network of its own and finds the others by the names of their services. A container gets what its
manifest says and nothing else: user, rights, a root that is read-only, files, variables, a bound on memory. Not here: a
scheduler, resources beyond memory, network policies, and who puts a pod back that failed.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Manifest = dict[str, Any]

_TIMEOUT_S = 180.0


def find_engine() -> str | None:
    """A program that can run containers here, as the user that this is."""
    for engine in ("podman", "docker"):
        if shutil.which(engine) and subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0:
            return engine
    return None


@dataclass(frozen=True)
class Objects:
    """What the manifests name and do not contain: secrets and claims; and config maps, by name."""

    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path]
    config_maps: Mapping[str, Mapping[str, str]]


@dataclass
class Pod:
    name: str
    spec: Manifest
    address: str
    folders: dict[str, Path]  # of its volumes

    def container(self, name: str) -> str:
        """The name that the engine knows a container by."""
        return f"{self.name}-{name}"


class Kubelet:
    """Starts, kills and cuts off pods; ``close`` ends them all."""

    def __init__(self, engine: str, folder: Path, objects: Objects) -> None:
        """``folder``: for volumes."""
        self._engine = engine
        self._folder = folder
        self._shm = Path("/dev/shm") / f"pods-{os.getpid()}"
        self._objects = objects
        self._network = f"pods-{os.getpid()}"
        self._containers: list[str] = []
        self._serial = itertools.count()
        self.engine("network", "create", self._network)

    def engine(self, *words: str, timeout_s: float = _TIMEOUT_S) -> str:
        """What it prints. Fails with what it says."""
        done = subprocess.run([self._engine, *words], capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout.strip()

    def start(self, name: str, spec: Manifest, service: str) -> Pod:
        """A pod behind ``service``, once its init containers are done and all others were started."""
        [image] = {container["image"] for container in spec["containers"]}
        infra = f"{name}-{next(self._serial)}"
        options = [f"--name={infra}", f"--network={self._network}", f"--network-alias={service}", "--init"]
        self._run(infra, ["-d", *options, image, "sleep", "infinity"])
        address = self.engine("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", infra)
        folders = {volume["name"]: self._volume(infra, spec, volume) for volume in spec["volumes"]}
        pod = Pod(infra, spec, address, folders)
        for container in spec.get("initContainers", []):
            if container.get("restartPolicy") == "Always":
                self._start(pod, container)
                self.wait_for(pod, container, "startupProbe")
            else:
                self.engine("run", "--rm", *self._options(pod, container), *_command(container))
        for container in spec["containers"]:
            self._start(pod, container)
        return pod

    def wait_for(self, pod: Pod, container: Manifest, *probes: str) -> None:
        """Each of its ``probes`` in turn."""
        for probe in (container[name] for name in probes):
            give_up = time.monotonic() + _TIMEOUT_S
            while not _answers(pod, container, probe):
                assert self.is_running(pod, container["name"]), self.logs(pod, container["name"])
                assert time.monotonic() < give_up, self.logs(pod, container["name"])
                time.sleep(0.2)

    def is_running(self, pod: Pod, container: str) -> bool:
        return self.engine("inspect", "-f", "{{.State.Running}}", pod.container(container)) == "true"

    def exit_code(self, pod: Pod, container: str) -> int:
        return int(self.engine("inspect", "-f", "{{.State.ExitCode}}", pod.container(container)))

    def logs(self, pod: Pod, container: str) -> str:
        words = [self._engine, "logs", "--tail=50", pod.container(container)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.stdout

    def kill(self, pod: Pod, container: str) -> None:
        """As a kernel does that is out of memory."""
        self.engine("kill", "--signal=KILL", pod.container(container))

    @contextlib.contextmanager
    def cut_off(self, pod: Pod) -> Iterator[None]:
        """Meanwhile whatever it sends, and is sent, is dropped without a word."""
        pid = self.engine("inspect", "-f", "{{.State.Pid}}", pod.name)
        rules = [("INPUT", "-i"), ("OUTPUT", "-o")]

        def filter_all(change: str) -> None:
            for chain, interface in rules:
                rule = ["iptables", change, chain, interface, "eth0", "-j", "DROP"]
                subprocess.run(["nsenter", "-t", pid, "-n", *rule], check=True, timeout=30)

        filter_all("-I")
        try:
            yield
        finally:
            filter_all("-D")

    def restart(self, pod: Pod, container: str) -> None:
        """One that has ended."""
        self.engine("start", pod.container(container))

    def delete(self, pod: Pod) -> None:
        """As Kubernetes does: what is to run before, SIGTERM, and SIGKILL after the pod's grace."""
        give_up = time.monotonic() + pod.spec["terminationGracePeriodSeconds"]
        for container in pod.spec["containers"]:
            before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if before is not None:
                self.engine("exec", pod.container(container["name"]), *before)
            grace = max(0, int(give_up - time.monotonic()))
            self.engine("stop", f"--time={grace}", pod.container(container["name"]), timeout_s=grace + 30)

    def client(self, *words: str, image: str, files: Path) -> subprocess.Popen[str]:
        """A process of the image in the pods' network, with ``files`` at /files."""
        name = f"client-{os.getpid()}-{next(self._serial)}"
        self._containers.append(name)
        options = [f"--name={name}", f"--network={self._network}", "-v", f"{files}:/files:ro"]
        return subprocess.Popen(
            [self._engine, "run", "--rm", *options, image, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def close(self) -> None:
        for name in reversed(self._containers):
            subprocess.run([self._engine, "rm", "-f", name], capture_output=True, timeout=60, check=False)
        with contextlib.suppress(AssertionError):
            self.engine("network", "rm", self._network)
        shutil.rmtree(self._shm, ignore_errors=True)

    def _start(self, pod: Pod, container: Manifest) -> None:
        name = pod.container(container["name"])
        self._run(name, ["-d", f"--name={name}", *self._options(pod, container), *_command(container)])

    def _run(self, name: str, words: list[str]) -> None:
        self._containers.append(name)
        self.engine("run", *words)

    def _options(self, pod: Pod, container: Manifest) -> list[str]:
        who, rights = pod.spec["securityContext"], container["securityContext"]
        assert who["runAsNonRoot"]
        assert rights["readOnlyRootFilesystem"]
        assert not rights["allowPrivilegeEscalation"]
        options = [
            f"--network=container:{pod.name}",
            f"--user={who['runAsUser']}:{who['runAsGroup']}",
            "--read-only",
            "--security-opt=no-new-privileges",
            f"--memory={_bytes(container['resources']['limits']['memory'])}",
            *(f"--cap-drop={name}" for name in rights["capabilities"]["drop"]),
            *(f"--env={name}={value}" for name, value in self._environment(container)),
        ]
        if self._engine == "podman":
            options.append("--read-only-tmpfs=false")  # of its own accord it makes /tmp, /run and /var/tmp writable
        if pod.spec.get("shareProcessNamespace"):
            options.append(f"--pid=container:{pod.name}")
        for mount in container["volumeMounts"]:
            suffix = ":ro" if mount.get("readOnly") else ""
            options += ["-v", f"{pod.folders[mount['name']]}:{mount['mountPath']}{suffix}"]
        return [*options, container["image"]]

    def _environment(self, container: Manifest) -> Iterator[tuple[str, str]]:
        for variable in container["env"]:
            if "value" in variable:
                yield variable["name"], variable["value"]
                continue
            wanted = variable["valueFrom"]["secretKeyRef"]
            secret = self._objects.secrets.get(wanted["name"], {})
            if wanted["key"] in secret:
                yield variable["name"], secret[wanted["key"]]
            else:
                assert wanted.get("optional"), f"no {wanted['key']} in the secret {wanted['name']}"

    def _volume(self, pod: str, spec: Manifest, volume: Manifest) -> Path:
        """A folder with its contents; files of secrets belong to the pod's group, as its fsGroup asks."""
        if "persistentVolumeClaim" in volume:
            return self._objects.claims[volume["persistentVolumeClaim"]["claimName"]]
        in_memory = volume.get("emptyDir", {}).get("medium") == "Memory"
        folder = (self._shm if in_memory else self._folder) / pod / volume["name"]
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        if "configMap" in volume:
            _write(folder, self._objects.config_maps[volume["configMap"]["name"]], 0o644, -1)
        for source in volume.get("projected", {}).get("sources", []):
            secret = self._objects.secrets[source["secret"]["name"]]
            files = {item["path"]: secret[item["key"]] for item in source["secret"]["items"]}
            _write(folder, files, volume["projected"]["defaultMode"], spec["securityContext"]["fsGroup"])
        return folder


def random_token() -> str:
    return base64.urlsafe_b64encode(os.urandom(24)).decode()


def kuberay_pods(cluster: Manifest) -> Iterator[tuple[str, Manifest, str]]:
    """(name, pod, service) for each that KubeRay would make of a RayCluster, the head's first.

    Nodes start by a line of a login shell. ``block``, the metrics' port and the memory are KubeRay's additions
    (ray-operator/controllers/ray/common/pod.go).
    """
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    service = f"{name}-head-svc"
    head = spec["headGroupSpec"]
    yield f"{name}-head", _ray_node("ray start --head", head), service
    for group in spec["workerGroupSpecs"]:
        for index in range(group["replicas"]):
            pod = f"{name}-{group['groupName']}-{index}"
            yield pod, _ray_node(f"ray start --address={service}:6379", group), pod


def _ray_node(start: str, group: Manifest) -> Manifest:
    spec: Manifest = group["template"]["spec"]
    [container] = spec["containers"]
    added = {
        "block": None,
        "metrics-export-port": 8080,
        "memory": _bytes(container["resources"]["limits"]["memory"]),
    }
    words = [
        f"--{key}" if value is None else f"--{key}={value}"
        for key, value in {**added, **group["rayStartParams"]}.items()
    ]
    line = f"ulimit -n 65536; {start} {' '.join(words)}"
    return {**spec, "containers": [{**container, "command": ["/bin/bash", "-lc", "--"], "args": [line]}]}


def _command(container: Manifest) -> list[str]:
    return [*container["command"], *container["args"]]


def _write(folder: Path, files: Mapping[str, str], mode: int, group: int) -> None:
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        os.chown(path, -1, group)
        path.chmod(mode)


def _bytes(quantity: str) -> int:
    units = {"Mi": 1 << 20, "Gi": 1 << 30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def _answers(pod: Pod, container: Manifest, probe: Manifest) -> bool:
    timeout_s = probe.get("timeoutSeconds", 1)
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    try:
        if "tcpSocket" in probe:
            socket.create_connection((pod.address, probe["tcpSocket"]["port"]), timeout_s).close()
        elif "grpc" in probe:
            with grpc.insecure_channel(f"{pod.address}:{probe['grpc']['port']}") as channel:
                asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            return bool(asked.status == health_pb2.HealthCheckResponse.SERVING)
        else:
            port = ports[probe["httpGet"]["port"]]
            with urllib.request.urlopen(f"http://{pod.address}:{port}{probe['httpGet']['path']}", timeout=timeout_s):
                pass
    except (OSError, grpc.RpcError):
        return False
    return True
