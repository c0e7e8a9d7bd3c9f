"""Whether a shape fits into the memory of the hosts, told with numbers before anything is touched."""

from __future__ import annotations

import pytest

from shardray.runtime.driver.fit import Offer, lack_of_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("needs", "num_replicas", "offer", "reason"),
    [
        ([4, 3], 1, Offer([], [8], 0.9), None),
        ([4, 8], 1, Offer([], [8], 0.9), "rank 1 needs 8.00 GiB for its weights and one sequence, a host has 7.20 GiB"),
        ([4, 3], 2, Offer([], [8], 0.9), "2 × 2 shards need 14.00 GiB for weights and a sequence each, the hosts have"),
        ([4, 3], 2, Offer([], [8, 8], 0.9), None),
        ([4, 3], 9, Offer([8, 8], [1], 0.9), None),  # each rank has a GPU of its own; the node's memory is no matter
        ([4, 3], 1, Offer([4, 2], [64], 0.9), "rank 0 needs 4.00 GiB for its weights and one sequence, a GPU has 3.60"),
        ([1], 1, Offer([], [], 0.9), "rank 0 needs 1.00 GiB for its weights and one sequence, a host has 0.00 GiB"),
    ],
)
def test_a_rank_has_a_gpu_of_its_own_and_cpus_share_their_node(
    needs: list[int], num_replicas: int, offer: Offer, reason: str | None
) -> None:
    offered = Offer([GIB * one for one in offer.gpus], [GIB * one for one in offer.nodes], offer.memory_utilization)
    found = lack_of_memory([GIB * need for need in needs], num_replicas, offered)
    assert found == reason if reason is None else found is not None and found.startswith(reason)
