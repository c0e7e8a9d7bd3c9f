"""Ranks and cores are dealt out so that groups stay on a node and no core has two owners."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.cluster.layout import core_shares, own_memory, rank_order
from shardray.runtime.cluster.reports import HostInfo
from shardray.runtime.engine.memory import MemoryGrant, room_on_cpu, room_on_gpu
from shardray.runtime.engine.served import read_served
from shardray.runtime.engine.shapes import cut
from shardray.runtime.engine.sizing import HostMemory, plan_mesh


def _host(node_id: str, gpu: int | None = None, num_cpus: int = 8) -> HostInfo:
    return HostInfo(
        node_id=node_id,
        host="10.0.0.1",
        pid=1,
        device="cpu" if gpu is None else "cuda:0",
        gpu_ids=() if gpu is None else (str(gpu),),
        cpu_ids=tuple(range(num_cpus)),
        group="g",
        bundle=0,
    )


def _nodes(nodes: str, tp_size: int) -> list[str]:
    """The nodes of each stage, e.g. ``aabb`` -> ["aa", "bb"]."""
    order = rank_order([_host(node) for node in nodes], tp_size)
    ranked = "".join(nodes[index] for index in order)
    return [ranked[start : start + tp_size] for start in range(0, len(nodes), tp_size)]


def test_tensor_groups_stay_on_one_node_however_the_bundles_fell() -> None:
    assert _nodes("abab", 2) == ["aa", "bb"]
    assert _nodes("abbabaab", 2) == ["aa", "aa", "bb", "bb"]


def test_a_small_node_takes_the_stage_that_fits_it() -> None:
    assert _nodes("aaabb", 5)[0] in ("aaabb", "bbaaa")
    assert sorted(_nodes("aaaabb", 2)) == ["aa", "aa", "bb"]
    assert "bbb" in _nodes("aaaaabbbb"[:6] + "bbb", 3)


def test_a_group_larger_than_any_node_spans_the_fewest_nodes() -> None:
    assert _nodes("abcabcaa", 8) == ["aaaabbcc"]


def test_hosts_of_one_node_are_ranked_by_gpu() -> None:
    infos = [_host("a", gpu) for gpu in (10, 2, 0)]
    assert rank_order(infos, 3) == [2, 1, 0]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), st.integers(1, 6))
def test_every_host_gets_exactly_one_rank(nodes: list[str], tp_size: int) -> None:
    assert sorted(rank_order([_host(node) for node in nodes], tp_size)) == list(range(len(nodes)))


def test_hosts_of_a_node_get_equal_disjoint_cores() -> None:
    shares = core_shares([_host("a"), _host("b"), _host("a")], None)
    assert shares[0].cpu_ids == (0, 1, 2, 3)
    assert shares[2].cpu_ids == (4, 5, 6, 7)
    assert [share.num_threads for share in shares] == [4, 8, 4]
    assert shares[1].cpu_ids == (), "alone on its node: nothing to pin"


def test_with_fewer_cores_than_hosts_nobody_is_pinned() -> None:
    shares = core_shares([_host("a", num_cpus=2) for _ in range(3)], None)
    assert all(share.num_threads == 1 and share.cpu_ids == () for share in shares)


def test_hosts_with_a_gpu_are_not_pinned() -> None:
    assert all(share.cpu_ids == () for share in core_shares([_host("a", 0), _host("a", 1)], None))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(1, 16), st.none() | st.integers(1, 8))
def test_no_core_has_two_owners(nodes: list[str], num_cpus: int, threads: int | None) -> None:
    infos = [_host(node, num_cpus=num_cpus) for node in nodes]
    shares = core_shares(infos, threads)
    owners = Counter((info.node_id, cpu) for info, share in zip(infos, shares, strict=True) for cpu in share.cpu_ids)
    assert all(count == 1 for count in owners.values())
    assert all(len(share.cpu_ids) in (0, share.num_threads) for share in shares)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replicas_of_a_node_have_the_room_that_was_planned(tiny_llama: Path, device: str, num_replicas: int) -> None:
    bounds = SimpleNamespace(max_num_seqs=100_000, max_num_batched_tokens=64, block_size=16)
    served = read_served(tiny_llama, "float32", 512, bounds)
    plan, is_shared, total = cut(served.spec, 2, 1, False), device == "cpu", 80 << 30
    planned = plan_mesh(served, plan, HostMemory(device, total, is_shared, False, 0.9), num_replicas).hosts
    in_use = [host.memory.loaded_bytes + host.runtime_bytes for host in planned]

    hosts = [_host("a", gpu if device == "cuda" else None) for gpu in range(2 * num_replicas)]
    share = own_memory(0.9, hosts[0], ["a", "a"], core_shares(hosts, None)[0])
    memory = planned[0].memory
    if device == "cuda":
        room = room_on_gpu(total - in_use[0], total, memory, MemoryGrant(share))
    else:
        room = room_on_cpu(total - num_replicas * sum(in_use), memory, MemoryGrant(share, num_ranks_here=2))
    assert room == pytest.approx(planned[0].room_bytes, abs=1)
