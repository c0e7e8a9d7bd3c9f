"""The front: one pod with the driver, and a raylet of its own beside it, by which the driver is part of the cluster.

A driver that reached Ray from outside (``ray://``) would hang on one proxy at the head; with a raylet at its side it is
connected as on any node. The raylet is a sidecar: it is up before the driver starts and goes when the driver has ended.
"""

from __future__ import annotations

import hashlib
import math

from shardray.runtime.config import Config
from shardray.runtime.config.units import is_loopback, parse_listen
from shardray.runtime.deploy.mounts import Mount, front_mounts, model_mounts, scratch_mounts
from shardray.runtime.deploy.names import (
    CONFIG_DIR,
    CONFIG_FILE,
    OBJECT_STORE_BYTES,
    Manifest,
    RenderError,
    RenderOptions,
)
from shardray.runtime.deploy.pods import container, pod_spec, raylet_probes
from shardray.runtime.deploy.ray_cluster import start_params
from shardray.runtime.deploy.sizes import PodSizes

_DRIVER_RESOURCES: Manifest = {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
_RAYLET_RESOURCES: Manifest = {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}
_JOURNAL_SIZE = "1Gi"
# Until every node knows that the pod takes no new connections; only then is the driver told to end.
_LEAVE_S = 5
# For hosts and Ray to be given back, after the last request.
_CLEAN_UP_S = 30


def front(config: Config, config_text: str, sizes: PodSizes, options: RenderOptions) -> list[Manifest]:
    """The serving file, the pod, the port; and the volume of the journal, if there is one."""
    _check_discovery(config, options)
    found = [_config_map(config_text, options), _service(config, options)]
    if config.driver.journal is not None:
        found.append(_journal_claim(options))
    return [*found, _deployment(config, config_text, sizes, options)]


def ports(config: Config) -> dict[str, int]:
    """By name. Raises RenderError for what no other pod could reach."""
    listens = {
        "grpc": ("grpc.listen", config.grpc.listen),
        "probe": ("grpc.probe_listen", config.grpc.probe_listen),
        "gateway": ("gateway.listen", config.gateway.listen),
        "metrics": ("metrics.listen", config.metrics.listen),
    }
    return {name: _port(key, listen) for name, (key, listen) in listens.items() if listen is not None}


def _port(key: str, listen: str) -> int:
    port = parse_listen(listen)[1]
    if is_loopback(listen) or port == 0:
        raise RenderError(
            f"{key}: {listen} is reached by nobody outside of its pod; give 0.0.0.0 and a port, 0.0.0.0:{port or 50051}"
        )
    return port


def _check_discovery(config: Config, options: RenderOptions) -> None:
    gateway = config.gateway
    if gateway.listen is not None and gateway.discovery_file is not None:
        port = parse_listen(gateway.listen)[1]
        raise RenderError(
            f"gateway.discovery_file: {gateway.discovery_file} would be in the front's pod, where no gateway watches "
            f"it; leave it out, and tell the gateway of the Service: smg launch --worker-urls grpc://{options.name}:{port}"
        )


def _config_map(config_text: str, options: RenderOptions) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": options.metadata("-serving"),
        "data": {CONFIG_FILE: config_text},
    }


def _service(config: Config, options: RenderOptions) -> Manifest:
    numbers = {name: port for name, port in ports(config).items() if name != "probe"}
    grpc: Manifest = {"appProtocol": "grpc"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": options.metadata(),
        "spec": {
            "selector": options.labels("front"),
            "ports": [
                {"name": name, "port": port, "targetPort": name, **({} if name == "metrics" else grpc)}
                for name, port in numbers.items()
            ],
        },
    }


def _journal_claim(options: RenderOptions) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": options.metadata("-journal"),
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": _JOURNAL_SIZE}}},
    }


def _deployment(config: Config, config_text: str, sizes: PodSizes, options: RenderOptions) -> Manifest:
    mounts = [
        *scratch_mounts(2 * OBJECT_STORE_BYTES),
        *model_mounts(config, options),
        *front_mounts(config, options),
    ]
    spec = pod_spec(
        [_driver(config, sizes, options, mounts)],
        mounts,
        shareProcessNamespace=True,  # Ray tells processes of one node by their ids
        terminationGracePeriodSeconds=_LEAVE_S + math.ceil(config.limits.shutdown_grace_s) + _CLEAN_UP_S,
        initContainers=[_weights(config, sizes, options, mounts), _raylet(sizes, options, mounts)],
    )
    digest = hashlib.sha256(config_text.encode()).hexdigest()[:16]  # another file, another pod
    metadata = {"labels": options.labels("front"), "annotations": {"shardray/serving-sha256": digest}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": options.metadata("-front"),
        "spec": {
            "replicas": 1,  # a second driver is refused by the hosts of the first
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": options.labels("front")},
            "template": {"metadata": metadata, "spec": spec},
        },
    }


def _driver(config: Config, sizes: PodSizes, options: RenderOptions, mounts: list[Mount]) -> Manifest:
    changes = [f"ray.address={options.head_address}", *_what_pods_are(config, sizes), *options.overrides]
    return container(
        "driver",
        sizes,
        options,
        mounts,
        command=["shardray", "serve", f"{CONFIG_DIR}/{CONFIG_FILE}"],
        args=[word for change in changes for word in ("--set", change)],
        ports=[{"name": name, "containerPort": port} for name, port in ports(config).items()],
        lifecycle={"preStop": {"exec": {"command": ["sleep", str(_LEAVE_S)]}}},
        resources=_DRIVER_RESOURCES,
        **_probes(config),
    )


def _what_pods_are(config: Config, sizes: PodSizes) -> list[str]:
    """What a host or the driver would guess from the machine it is on, and guess wrong."""
    if sizes.device == "cuda":  # the driver may be there before the first GPU is
        return [] if config.engine.device == "cuda" else ["engine.device=cuda"]
    if config.engine.threads_per_host is not None:
        return []
    # All cores of the node, whatever the pod asked for.
    return [f"engine.threads_per_host={max(1, int(config.ray.cpus_per_host))}"]


def _weights(config: Config, sizes: PodSizes, options: RenderOptions, mounts: list[Mount]) -> Manifest:
    """Fetches what the driver reads, before that starts and has an hour to listen: hundreds of gigabytes take longer.

    An init container has no deadline, and one that fails is started again and finds what it had fetched.
    """
    model = config.model
    return container(
        "weights",
        sizes,
        options,
        [mount for mount in mounts if mount.name in ("tmp", "home", "models")],
        command=["shardray", "pull", model.source],
        args=[] if model.revision is None else ["--revision", model.revision],
        resources=_DRIVER_RESOURCES,
    )


def _raylet(sizes: PodSizes, options: RenderOptions, mounts: list[Mount]) -> Manifest:
    """Without room for hosts."""
    params = {"address": options.head_address, **start_params(), "num-cpus": "0", "num-gpus": "0"}
    shared = [mount for mount in mounts if mount.name in ("tmp", "shared-mem", "home")]
    return container(
        "raylet",
        sizes,
        options,
        shared,
        restartPolicy="Always",
        command=["ray", "start", "--block"],
        args=[f"--{name}={value}" for name, value in params.items()],
        resources=_RAYLET_RESOURCES,
        startupProbe=raylet_probes()["startupProbe"],
    )


def _probes(config: Config) -> Manifest:
    """Ready as health says. Alive as long as it answers at all: a model that loads, or has no hosts, is no reason."""
    found = ports(config)
    if config.grpc.tls is not None and "probe" not in found:
        raise RenderError(
            "grpc.probe_listen: null, and kubelet asks for health in plain text, which grpc.tls refuses; "
            "give 0.0.0.0:50052"
        )
    asked = found.get("probe", found["grpc"])
    if "metrics" in found:  # answers 503 when the driver's loop does not
        alive: Manifest = {"httpGet": {"path": "/fleet.json", "port": "metrics"}, "timeoutSeconds": 10}
    else:
        alive = {"tcpSocket": {"port": asked}}
    return {
        "startupProbe": {"tcpSocket": {"port": asked}, "periodSeconds": 5, "failureThreshold": 720},
        "readinessProbe": {"grpc": {"port": asked}, "periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": {**alive, "periodSeconds": 15, "failureThreshold": 4},
    }
