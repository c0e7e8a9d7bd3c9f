"""A replica across nodes: a real Ray of several raylets, whose hosts share no memory and talk over TCP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from shardray.runtime.cluster.events import ClusterEvent, PlacementWaiting
from shardray.runtime.cluster.form import FormedMesh
from shardray.runtime.driver.fit import check_room
from shardray.runtime.driver.operations import OperationRefusedError
from tests.cluster.fleets import fleet_config, generate, make_tiny_llama, reference_ids, running, several_nodes

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]
_STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with several_nodes(2, num_cpus=2) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        yield nodes
        ray.shutdown()


def _nodes_of(mesh: FormedMesh) -> list[str]:
    """The node of each rank."""
    return [host.info.node_id for host in mesh.hosts]


async def _lose_node(cluster: Cluster, node_id: str) -> None:
    """Its raylet is killed, and with it everything on the node."""
    lost = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)


def _add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES)  # in the main thread: it sets signal handlers


async def test_a_tensor_group_spans_nodes(cluster: Cluster, tiny_llama: Path) -> None:
    config = fleet_config(tiny_llama, tp_size=2, address="auto", placement_strategy="STRICT_SPREAD")
    async with running(config) as (_, outlet):
        assert len(set(_nodes_of(outlet.meshes[0]))) == 2
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)


async def test_stages_span_nodes_and_tensor_groups_stay_on_one(cluster: Cluster, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, tp_size=2, pp_size=2, address="auto")) as (_, outlet):
        nodes = _nodes_of(outlet.meshes[0])
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        assert await generate(outlet.meshes[0]) == reference_ids(tiny_llama)


async def test_a_fleet_may_grow_onto_nodes_where_it_has_no_host(cluster: Cluster, tiny_llama: Path) -> None:
    node_bytes = ray.nodes()[0]["Resources"]["memory"]
    async with running(fleet_config(tiny_llama, address="auto")) as (fleet, _):
        config = fleet.recipe.config
        engine = dataclasses.replace(config.engine, kv_memory_bytes=int(0.6 * node_bytes))
        large = dataclasses.replace(fleet.recipe, config=dataclasses.replace(config, engine=engine))
        await check_room(fleet, large, 2)
        with pytest.raises(OperationRefusedError, match="use fewer replicas"):
            await check_room(fleet, large, 4)


async def test_a_replica_moves_off_a_lost_node_where_the_others_have_room(cluster: Cluster, tiny_llama: Path) -> None:
    async with running(fleet_config(tiny_llama, pp_size=2, address="auto")) as (_, outlet):
        before = outlet.meshes[0]
        [node_id] = set(_nodes_of(before))
        await _lose_node(cluster, node_id)
        mesh = await outlet.next_mesh(0, before)
        assert node_id not in _nodes_of(mesh)
        assert await generate(mesh) == reference_ids(tiny_llama)
    _add_node(cluster)


async def test_a_spare_and_the_room_beside_it_take_the_place_of_a_lost_node(cluster: Cluster, tiny_llama: Path) -> None:
    """Two hosts are lost and one is missing: there is a place for that one, and not for two."""
    async with running(fleet_config(tiny_llama, tp_size=2, spares=1, address="auto")) as (fleet, outlet):
        before = outlet.meshes[0]
        [node_id] = set(_nodes_of(before))
        async with asyncio.timeout(30):
            while not fleet.pool.idle:
                await asyncio.sleep(0.1)
        [spare] = fleet.pool.idle
        assert spare.info.node_id != node_id
        await _lose_node(cluster, node_id)
        mesh = await outlet.next_mesh(0, before)
        assert spare in mesh.hosts
        assert set(_nodes_of(mesh)) == {spare.info.node_id}
        assert await generate(mesh) == reference_ids(tiny_llama)
    _add_node(cluster)


async def test_without_room_a_replica_waits_and_runs_again_when_a_node_comes(
    cluster: Cluster, tiny_llama: Path
) -> None:
    events: list[ClusterEvent] = []
    config = fleet_config(tiny_llama, pp_size=2, address="auto", placement_strategy="STRICT_SPREAD")
    async with running(config, events.append) as (_, outlet):
        before = outlet.meshes[0]
        await _lose_node(cluster, _nodes_of(before)[1])
        async with asyncio.timeout(60):
            while not any(isinstance(event, PlacementWaiting) for event in events):
                await asyncio.sleep(0.1)
        assert outlet.losses[0].startswith("stage 1 tensor rank 0 (host ")
        assert 0 not in outlet.meshes
        _add_node(cluster)
        mesh = await outlet.next_mesh(0, before)
        assert len(set(_nodes_of(mesh))) == 2
        assert await generate(mesh) == reference_ids(tiny_llama)


async def test_a_replica_that_may_degrade_runs_smaller_until_the_node_is_back(
    cluster: Cluster, tiny_llama: Path
) -> None:
    config = fleet_config(tiny_llama, tp_size=3, address="auto", degrade=True)
    async with running(config) as (_, outlet):
        whole = outlet.meshes[0]
        await _lose_node(cluster, _nodes_of(whole)[2])
        smaller = await outlet.next_mesh(0, whole)
        assert len(smaller.hosts) == 2
        assert await generate(smaller) == reference_ids(tiny_llama)
        _add_node(cluster)
        again = await outlet.next_mesh(0, smaller)
        assert len(again.hosts) == 3
        assert await generate(again) == reference_ids(tiny_llama)
