"""Room for the hosts of one replica: a Ray placement group, with a deadline and a plain reason when there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from shardray.runtime.cluster.errors import PlacementError
from shardray.runtime.cluster.ray_call import in_ray

Resources = Mapping[str, float]
WaitSink = Callable[[str, float], None]  # (reason, seconds left)
_POLL_S = 1


@dataclass(frozen=True)
class HostsNeed:
    """What one replica asks of the cluster."""

    num_hosts: int
    cpus_per_host: float
    gpus_per_host: int  # 0 or 1
    strategy: str  # PACK, SPREAD, STRICT_PACK or STRICT_SPREAD

    def of(self, num_hosts: int) -> HostsNeed:
        """The same for another number of hosts."""
        return replace(self, num_hosts=num_hosts)

    @property
    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.cpus_per_host}
        if self.gpus_per_host:
            bundle["GPU"] = float(self.gpus_per_host)
        return bundle

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus_per_host else "CPU"


async def place(need: HostsNeed, name: str, timeout_s: float, can_grow: bool, on_wait: WaitSink) -> PlacementGroup:
    """A placement group that holds one bundle per host, and outlives this process.

    Waits up to ``timeout_s`` for room, telling ``on_wait`` why; at once refuses what a cluster that cannot grow will
    never hold. Raises ClusterError, PlacementError where there is no room.
    """
    reason = await in_ray(shortage_now, need)
    if reason is not None and not can_grow:
        raise PlacementError(reason)
    group: PlacementGroup = await in_ray(
        placement_group, [need.bundle] * need.num_hosts, strategy=need.strategy, name=name, lifetime="detached"
    )
    placed = False
    try:
        placed = await _wait_until_placed(group, need, timeout_s, on_wait)
    finally:
        if not placed:
            await in_ray(remove_placement_group, group)
    return group


async def _wait_until_placed(group: PlacementGroup, need: HostsNeed, timeout_s: float, on_wait: WaitSink) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        remaining_s = deadline - time.monotonic()
        if await in_ray(group.wait, max(0.01, min(_POLL_S, remaining_s))):
            return True
        reason = await in_ray(lambda: shortage_now(need) or _busy(need, free_bundles(need)))
        if remaining_s <= 0:
            raise PlacementError(f"{reason}; gave up after {timeout_s:g} s (ray.form_timeout_s)")
        on_wait(reason, remaining_s)


def shortage_now(need: HostsNeed) -> str | None:
    """``shortage`` for the nodes that are alive now. Blocks on Ray."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return shortage(need, [node["Resources"] for node in nodes if node["Alive"]])


def shortage(need: HostsNeed, nodes: Sequence[Resources]) -> str | None:
    """Why these nodes, were they idle, could not hold the bundles; None if they could."""
    fits = [count for count in (_num_fitting(need.bundle, node) for node in nodes) if count]
    wanted = _count(need.num_hosts, f"{need.unit} bundle")
    if need.strategy == "STRICT_PACK" and max(fits, default=0) < need.num_hosts:
        text = f"needs {wanted} on one node (STRICT_PACK), the largest node has {max(fits, default=0)}"
    elif need.strategy == "STRICT_SPREAD" and len(fits) < need.num_hosts:
        text = f"needs {wanted} on as many nodes (STRICT_SPREAD), the cluster has {_count(len(fits), 'such node')}"
    elif sum(fits) < need.num_hosts:
        text = f"needs {wanted}, the cluster has {sum(fits)} on {_count(len(nodes), 'node')}"
    else:
        return None
    return text + _bundle_note(need, nodes)


def _bundle_note(need: HostsNeed, nodes: Sequence[Resources]) -> str:
    """Say what a bundle is where a node holds fewer of them than it has of the unit."""
    if all(_num_fitting(need.bundle, node) == int(node.get(need.unit, 0)) for node in nodes):
        return ""
    parts = " and ".join(f"{amount:g} {name}" for name, amount in sorted(need.bundle.items(), reverse=True))
    return f" (a bundle is {parts}: ray.cpus_per_host)"


def _busy(need: HostsNeed, num_free: int) -> str:
    wanted = _count(need.num_hosts, f"{need.unit} bundle")
    return f"needs {wanted}, the cluster has enough but at most {num_free} free; other work holds the rest"


def free_bundles(need: HostsNeed) -> int:
    """An upper bound of bundles that fit now: Ray tells what is free in all, not where. Blocks on Ray."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return _num_fitting(need.bundle, free)


def node_memory(need: HostsNeed) -> list[int]:
    """Bytes that each node on which a bundle fits had free when Ray was started there. Blocks on Ray."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    able = [node for node in nodes if _num_fitting(need.bundle, node)]
    # Ray keeps a part of it for its object store, of which hosts use next to nothing.
    return [int(node.get("memory", 0) + node.get("object_store_memory", 0)) for node in able]


def _num_fitting(bundle: Resources, node: Resources) -> int:
    return min(int((node.get(name, 0.0) + 1e-6) // amount) for name, amount in bundle.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
