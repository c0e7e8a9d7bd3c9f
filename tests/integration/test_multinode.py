"""A replica across nodes: a real Ray of several raylets, whose hosts share no memory and talk over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from shardray.runtime.cluster.replica import ReplicaSet
from tests.cluster.fleets import fleet_config, generate, make_tiny_llama, reference_ids, running

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]
_STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for hosts, and two nodes with room for two each."""
    head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _nodes_of(fleet: ReplicaSet) -> list[str]:
    """The node of each rank."""
    nodes = {host.info.pid: host.info.node_id for host in fleet.replicas[0].hosts}
    return [nodes[shard.pid] for shard in fleet.replicas[0].shards]


async def test_a_tensor_group_spans_nodes(cluster: Cluster, tiny_llama: Path) -> None:
    config = fleet_config(tiny_llama, tp_size=2, address="auto", placement_strategy="STRICT_SPREAD")
    async with running(config) as fleet:
        assert len(set(_nodes_of(fleet))) == 2
        assert await generate(fleet.replicas[0]) == reference_ids(tiny_llama)


async def test_stages_span_nodes_and_tensor_groups_stay_on_one(cluster: Cluster, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2, pp_size=2, address="auto")) as fleet:
        nodes = _nodes_of(fleet)
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        assert await generate(fleet.replicas[0]) == reference_ids(tiny_llama)


async def test_a_lost_node_ends_its_replica_with_the_reason(cluster: Cluster, tiny_llama: Path) -> None:
    config = fleet_config(tiny_llama, pp_size=2, address="auto", placement_strategy="STRICT_SPREAD")
    async with running(config) as fleet:
        lost_id = _nodes_of(fleet)[1]
        lost = next(node for node in cluster.worker_nodes if node.unique_id == lost_id or node.node_id == lost_id)
        await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)
        reason = await asyncio.wait_for(fleet.replicas[0].failed, timeout=30)
        assert reason.startswith("stage 1 tensor rank 0 (host ")
        assert "died" in reason
