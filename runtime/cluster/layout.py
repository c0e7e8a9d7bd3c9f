"""Who takes which rank, and which cores: pure functions over what hosts told about themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from shardray.runtime.cluster.reports import HostInfo


@dataclass(frozen=True)
class CoreShare:
    """A host's part of its node's cores."""

    num_threads: int
    cpu_ids: tuple[int, ...]  # pin to these; empty: do not pin
    hosts_on_node: int


def rank_order(infos: Sequence[HostInfo], tp_size: int) -> list[int]:
    """Indices into ``infos`` in rank order, so that as many tensor groups as possible stay on one node.

    Each stage goes to the node of the stage before it if that has ``tp_size`` hosts left, else to the fullest fit,
    else it is spread over the nodes with most hosts left.
    """
    free = _by_node(infos)
    order: list[int] = []
    while any(free.values()):
        previous = infos[order[-1]].node_id if order else None
        for node_id in _nodes_for_stage(free, tp_size, previous):
            missing = tp_size - len(order) % tp_size
            taken, free[node_id] = free[node_id][:missing], free[node_id][missing:]
            order += taken
            if len(order) % tp_size == 0:
                break
    return order


def _nodes_for_stage(free: dict[str, list[int]], tp_size: int, previous: str | None) -> list[str]:
    """The nodes to take a stage's hosts from, in order."""
    enough = [node_id for node_id, hosts in free.items() if len(hosts) >= tp_size]
    if enough:
        return [min(enough, key=lambda node_id: (node_id != previous, len(free[node_id])))]
    return sorted(free, key=lambda node_id: -len(free[node_id]))


def core_shares(infos: Sequence[HostInfo], threads_per_host: int | None) -> list[CoreShare]:
    """An equal, disjoint share of its node's cores for each host, in the order of ``infos``.

    Hosts are pinned only where every one on the node gets cores of its own and less than all of them; hosts with a GPU
    are not pinned.
    """
    shares: dict[int, CoreShare] = {}
    for indices in _by_node(infos).values():
        cpu_ids = infos[indices[0]].cpu_ids
        num_threads = threads_per_host or max(1, len(cpu_ids) // len(indices))
        fits = num_threads * len(indices) <= len(cpu_ids) and num_threads < len(cpu_ids)
        for position, index in enumerate(indices):
            pinned = fits and infos[index].device == "cpu"
            own = cpu_ids[position * num_threads : (position + 1) * num_threads] if pinned else ()
            shares[index] = CoreShare(num_threads, own, len(indices))
    return [shares[index] for index in range(len(infos))]


def own_memory(utilization: float, info: HostInfo, nodes: Sequence[str], share: CoreShare) -> float:
    """The part of ``utilization`` that a host's mesh, which is on ``nodes``, may take of the memory that the host uses.

    A GPU is its host's alone. A node's memory is for the hosts of all replicas there; those of one mesh divide its part
    among themselves.
    """
    return utilization * nodes.count(info.node_id) / share.hosts_on_node if info.device == "cpu" else utilization


def _by_node(infos: Sequence[HostInfo]) -> dict[str, list[int]]:
    """Indices of the hosts on each node, in the order of their GPUs."""
    nodes: dict[str, list[int]] = defaultdict(list)
    for index, info in enumerate(infos):
        nodes[info.node_id].append(index)
    for indices in nodes.values():
        indices.sort(key=lambda index: tuple((len(gpu), gpu) for gpu in infos[index].gpu_ids))
    return dict(nodes)
