"""The RayCluster: a head without hosts, and one group of worker pods for them."""

from __future__ import annotations

import math

from shardray.runtime.config import Config
from shardray.runtime.deploy.mounts import Mount, cluster_mounts, model_mounts, scratch_mounts
from shardray.runtime.deploy.names import OBJECT_STORE_BYTES, RAYLET_PORT, Manifest, RenderOptions, env
from shardray.runtime.deploy.pods import container, pod_spec, raylet_probes
from shardray.runtime.deploy.sizes import PodSizes

_HEAD_RESOURCES: Manifest = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
# A node that does not answer is given up after 36 s; Ray's default is a minute, in which hosts are still placed there.
_HEALTH_CHECKS = {"RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "6"}
# Ray gives a worker's processes some time to end by themselves; hosts outlive nothing that they could save.
_WORKER_GRACE_S = 30


def ray_cluster(config: Config, sizes: PodSizes, options: RenderOptions) -> Manifest:
    """As many workers as the fleet can ever need: KubeRay keeps their number, shardray what runs on them."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": options.metadata(),
        "spec": {
            "headGroupSpec": {
                "rayStartParams": {**start_params(), "num-cpus": "0", "num-gpus": "0", "include-dashboard": "false"},
                "template": _head(sizes, options),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "hosts",
                    "replicas": sizes.num_pods,
                    "minReplicas": sizes.num_pods,
                    "maxReplicas": sizes.num_pods,
                    "rayStartParams": {**start_params(), **_places(sizes)},
                    "template": _worker(config, sizes, options),
                }
            ],
        },
    }


def start_params() -> dict[str, str]:
    """Options of ``ray start`` on every node."""
    return {"node-manager-port": str(RAYLET_PORT), "object-store-memory": str(OBJECT_STORE_BYTES)}


def _places(sizes: PodSizes) -> dict[str, str]:
    """What Ray counts: CPUs in whole numbers, and every host has to find its part."""
    num_gpus = sizes.hosts_per_pod if sizes.device == "cuda" else 0
    return {"num-cpus": str(math.ceil(sizes.cpus)), "num-gpus": str(num_gpus)}


def _head(sizes: PodSizes, options: RenderOptions) -> Manifest:
    mounts = scratch_mounts(2 * OBJECT_STORE_BYTES)
    head = container("ray-head", sizes, options, mounts, resources=_HEAD_RESOURCES, **raylet_probes())
    head["env"] += env(_HEALTH_CHECKS)
    return {"metadata": {"labels": options.labels("head")}, "spec": pod_spec([head], mounts)}


def _worker(config: Config, sizes: PodSizes, options: RenderOptions) -> Manifest:
    mounts: list[Mount] = [
        *scratch_mounts(sizes.shm_bytes),
        *model_mounts(config, options),
        *cluster_mounts(config, options),
    ]
    worker = container("ray-worker", sizes, options, mounts, resources=sizes.resources(), **raylet_probes())
    gpu_nodes = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    more = {"tolerations": gpu_nodes} if sizes.device == "cuda" else {}
    spec = pod_spec([worker], mounts, terminationGracePeriodSeconds=_WORKER_GRACE_S, **more)
    return {"metadata": {"labels": options.labels("worker")}, "spec": spec}
