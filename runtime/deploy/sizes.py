"""How many pods, and what each asks of its node: from the shape of the serving file and from the plan of its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardray.runtime.config import Config
from shardray.runtime.deploy.names import OBJECT_STORE_BYTES, Manifest, RenderError, RenderOptions

_MIB, _GIB = 1 << 20, 1 << 30
_MOST_DEVICES = 8  # of a usual node
# Of a host with a GPU, besides the GPU's own: interpreter, CUDA's libraries, weights on their way. An estimate.
_GPU_HOST_BYTES = 8 * _GIB
_NCCL_BYTES = 256 * _MIB  # of /dev/shm, for each rank
_SLACK = 1.25  # what loading takes for moments, page tables, Ray's own processes
_ROUND_BYTES = 256 * _MIB
# Hosts in a memory without bounds: how much they want, not what fits.
_UNBOUNDED_BYTES = 1 << 50


@dataclass(frozen=True)
class PodSizes:
    """The worker pods of a fleet."""

    device: str  # "cuda" or "cpu"
    num_pods: int
    hosts_per_pod: int
    cpus: float
    memory_bytes: int
    shm_bytes: int

    def resources(self) -> Manifest:
        """Memory is a limit as well: hosts on CPUs size their pages by it. Processors are not: idle ones are free."""
        amounts: Manifest = {"cpu": quantity(self.cpus), "memory": mebibytes(self.memory_bytes)}
        gpus = {"nvidia.com/gpu": str(self.hosts_per_pod)} if self.device == "cuda" else {}
        return {"requests": {**amounts, **gpus}, "limits": {"memory": amounts["memory"], **gpus}}


def size_pods(config: Config, options: RenderOptions) -> PodSizes:
    """Reads the model's headers if its hosts run on CPUs. Raises RenderError, or what is wrong with the model."""
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    hosts_per_pod = options.hosts_per_pod or _usual_hosts(config)
    _check_strategy(config, hosts_per_pod)
    shm_bytes = 2 * OBJECT_STORE_BYTES + (hosts_per_pod * _NCCL_BYTES if device == "cuda" else 0)
    return PodSizes(
        device=device,
        num_pods=math.ceil(_num_hosts(config) / hosts_per_pod),
        hosts_per_pod=hosts_per_pod,
        cpus=hosts_per_pod * config.ray.cpus_per_host,
        memory_bytes=options.memory_bytes or _memory(config, device, hosts_per_pod) + shm_bytes,
        shm_bytes=shm_bytes,
    )


def _num_hosts(config: Config) -> int:
    """As many as there may ever be: the cluster does not grow by itself."""
    replicas = max(config.parallel.replicas, config.autoscaling.max_replicas or 0)
    return replicas * config.parallel.hosts_per_replica + config.cluster.spares


def _usual_hosts(config: Config) -> int:
    """A tensor group to a pod, as far as a node has devices; what the placement strategy asks for otherwise."""
    strategy = config.ray.placement_strategy
    if strategy == "STRICT_PACK":
        return config.parallel.hosts_per_replica
    return 1 if strategy == "STRICT_SPREAD" else min(config.parallel.tensor_parallel_size, _MOST_DEVICES)


def _check_strategy(config: Config, hosts_per_pod: int) -> None:
    strategy, replica = config.ray.placement_strategy, config.parallel.hosts_per_replica
    if strategy == "STRICT_PACK" and hosts_per_pod % replica:
        raise RenderError(
            f"--hosts-per-pod {hosts_per_pod}: a replica is {replica} hosts on one node (ray.placement_strategy "
            f"STRICT_PACK); give a multiple of {replica}, or PACK"
        )
    if strategy == "STRICT_SPREAD" and hosts_per_pod != 1:
        raise RenderError(
            f"--hosts-per-pod {hosts_per_pod}: every host is on a node of its own (ray.placement_strategy "
            f"STRICT_SPREAD); give 1, or SPREAD"
        )


def _memory(config: Config, device: str, hosts_per_pod: int) -> int:
    if device == "cuda":
        return hosts_per_pod * _GPU_HOST_BYTES
    if config.engine.kv_memory_bytes is None:
        raise RenderError(
            "engine.kv_memory_bytes: null takes what is free, and a pod has to say what it needs; give a size such as "
            "2GiB, or --memory for the whole pod"
        )
    return _rounded(hosts_per_pod * _cpu_host_bytes(config) * _SLACK)


def _cpu_host_bytes(config: Config) -> int:
    """Of the host that takes most, by the formulas that hosts themselves use; whatever machine this is rendered on."""
    from shardray.runtime.engine.plan_report import open_model
    from shardray.runtime.engine.shapes import cut_as_configured
    from shardray.runtime.engine.sizing import HostMemory, plan_mesh

    _, served = open_model(config)
    engine = config.engine
    plan = cut_as_configured(served.spec, config.parallel)
    offer = HostMemory("cpu", _UNBOUNDED_BYTES, False, True, engine.memory_utilization, engine.kv_memory_bytes)
    mesh = plan_mesh(served, plan, offer)
    return max(
        host.runtime_bytes + host.memory.loaded_bytes + host.memory.step_bytes + mesh.kv_bytes(host)
        for host in mesh.hosts
    )


def _rounded(num_bytes: float) -> int:
    return math.ceil(num_bytes / _ROUND_BYTES) * _ROUND_BYTES


def mebibytes(num_bytes: int) -> str:
    """As Kubernetes writes it."""
    return f"{math.ceil(num_bytes / _MIB)}Mi"


def quantity(number: float) -> str:
    """Processors: whole ones, or thousandths."""
    return str(int(number)) if number == int(number) else f"{math.ceil(number * 1000)}m"
