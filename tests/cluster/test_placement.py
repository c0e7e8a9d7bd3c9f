"""A replica's hosts get room, or a deadline passes and the reason is plain."""

from __future__ import annotations

import time
import uuid

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from shardray.runtime.cluster.errors import PlacementError
from shardray.runtime.cluster.placement import HostsNeed, place, shortage
from shardray.runtime.cluster.ray_session import RaySession

_TWO_NODES = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


def _need(num_hosts: int, gpus: int = 0, strategy: str = "PACK", cpus: float = 1.0) -> HostsNeed:
    return HostsNeed(num_hosts=num_hosts, cpus_per_host=cpus, gpus_per_host=gpus, strategy=strategy)


def _name() -> str:
    return f"test/{uuid.uuid4().hex}"


def _ignore(reason: str, remaining_s: float) -> None:
    pass


def test_too_few_gpus_are_counted() -> None:
    assert shortage(_need(4, gpus=1), _TWO_NODES) == "needs 4 GPU bundles, the cluster has 3 on 2 nodes"
    assert shortage(_need(3, gpus=1), _TWO_NODES) is None


def test_a_lack_of_cpus_beside_the_gpus_is_not_called_a_lack_of_gpus() -> None:
    reason = shortage(_need(2, gpus=1, cpus=8.0), [{"CPU": 8.0, "GPU": 4.0}])
    assert reason == (
        "needs 2 GPU bundles, the cluster has 1 on 1 node (a bundle is 1 GPU and 8 CPU: ray.cpus_per_host)"
    )


def test_strict_strategies_name_what_they_ask_for() -> None:
    packed = shortage(_need(3, gpus=1, strategy="STRICT_PACK"), _TWO_NODES)
    assert packed == "needs 3 GPU bundles on one node (STRICT_PACK), the largest node has 2"
    spread = shortage(_need(3, gpus=1, strategy="STRICT_SPREAD"), _TWO_NODES)
    assert spread == "needs 3 GPU bundles on as many nodes (STRICT_SPREAD), the cluster has 2 such nodes"


@pytest.mark.integration
@pytest.mark.asyncio
async def test_a_cluster_that_cannot_grow_refuses_at_once(local_ray: RaySession) -> None:
    began = time.monotonic()
    with pytest.raises(PlacementError, match="needs 2 GPU bundles, the cluster has 0 on 1 node"):
        await place(_need(2, gpus=1), _name(), timeout_s=60, can_grow=False, on_wait=_ignore)
    assert time.monotonic() - began < 5


@pytest.mark.integration
@pytest.mark.asyncio
async def test_a_cluster_that_may_grow_is_waited_for_visibly_until_the_deadline(local_ray: RaySession) -> None:
    waits: list[tuple[str, float]] = []
    with pytest.raises(PlacementError, match=r"has 0 on 1 node; gave up after 1\.5 s \(ray\.form_timeout_s\)"):
        await place(_need(1, gpus=1), _name(), 1.5, can_grow=True, on_wait=lambda *wait: waits.append(wait))
    assert waits
    assert all("needs 1 GPU bundle," in reason and 0 < left_s <= 1.5 for reason, left_s in waits)


@pytest.mark.integration
@pytest.mark.asyncio
async def test_room_that_others_hold_is_told_from_room_that_is_missing(local_ray: RaySession) -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    group = await place(_need(num_cpus - 1), _name(), timeout_s=10, can_grow=False, on_wait=_ignore)
    try:
        with pytest.raises(PlacementError, match="enough but at most 1 free; other work holds the rest"):
            await place(_need(3), _name(), timeout_s=0.5, can_grow=False, on_wait=_ignore)
    finally:
        remove_placement_group(group)


@pytest.mark.integration
@pytest.mark.asyncio
async def test_a_place_given_up_is_free_again(local_ray: RaySession) -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    for _ in range(2):
        group = await place(_need(num_cpus), _name(), timeout_s=10, can_grow=False, on_wait=_ignore)
        remove_placement_group(group)
