"""Whether Ray starts here, or answers where it runs, and has room: for a look before a fleet is served."""

from __future__ import annotations

import importlib.metadata

import ray

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.placement import free_bundles, shortage_now
from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.cluster.replica_set import hosts_need
from shardray.runtime.config import Config


def ray_version() -> str:
    return importlib.metadata.version("ray")


def try_ray(config: Config) -> str:
    """Open a session as ``serve`` does and close it again; what was found. Blocks. Raises ClusterError."""
    session = RaySession(config.ray, config.parallel.num_hosts)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        found = f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {resources.get('GPU', 0):g} GPUs"
        need, num_hosts = hosts_need(config), config.parallel.num_hosts
        if (reason := shortage_now(need)) is not None:
            raise ClusterError(reason)
        if (num_free := free_bundles(need)) < num_hosts:
            raise ClusterError(
                f"needs {num_hosts} {need.unit} bundles for all replicas, the cluster has {num_free} free"
            )
    finally:
        session.stop()
    return found
