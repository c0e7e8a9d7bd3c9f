"""Forming a mesh of real processes: places, deadlines that name who is missing, ranks that are lost on the way."""

from __future__ import annotations

import signal
import socket
import threading
import time

import pytest
import torch

from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost
from shardray.parallel.mesh import Mesh, open_mesh
from shardray.parallel.store import join_torch_store, open_torch_store
from tests.parallel.rank_processes import (
    HIDDEN_SIZE,
    MAX_TOKENS,
    Failure,
    RankProcesses,
    end_this_process,
    open_rendezvous,
    own_place,
    start_clock,
)


def describe(mesh: Mesh) -> tuple[int, int, int, bool, bool, list[int], int]:
    spec, least = mesh.spec, mesh.agree_on_minimum("least", 10 - mesh.spec.rank)
    has_up, has_down = mesh.upstream is not None, mesh.downstream is not None
    return spec.stage, spec.tp_rank, mesh.tp.size, has_up, has_down, sorted(mesh.links), least


def test_ranks_run_along_the_tensor_axis_first(ranks: RankProcesses) -> None:
    assert ranks.run(describe, tp_size=2, pp_size=2) == [
        (0, 0, 2, False, True, [1, 2, 3], 7),
        (0, 1, 2, False, True, [0], 7),
        (1, 0, 2, True, False, [0], 7),
        (1, 1, 2, True, False, [0], 7),
    ]


def test_a_mesh_of_one_needs_nobody() -> None:
    mesh = open_mesh(own_place(0, 1, 1, 0, "solo"), MAX_TOKENS, HIDDEN_SIZE, torch.float32)
    assert mesh.agree_on_minimum("pages", 5) == 5
    mesh.abort()
    mesh.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_store_of_a_group_on_gpus_is_found_on_either_kind_of_address(host: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    store, port = open_torch_store(host)
    join_torch_store(host, port, timeout_s=5.0).set("who", "a rank")
    assert store.get("who") == b"a rank"


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_an_aborted_rendezvous_frees_who_waits_there_for_a_rank_that_does_not_come() -> None:
    rendezvous = open_rendezvous("aborted", size=2)
    place = own_place(0, 1, 2, rendezvous.port, "aborted")
    threading.Timer(0.3, rendezvous.abort).start()
    began = time.monotonic()
    with pytest.raises(MeshAborted, match="forming"):
        open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)
    assert time.monotonic() - began < place.form_timeout_s / 2
    rendezvous.close()


def sums_over_mixed_nodes(mesh: Mesh) -> float:
    x = mesh.tp.all_reduce(torch.full((3,), float(mesh.spec.tp_rank + 1)))
    if mesh.upstream is not None:
        x = mesh.upstream.recv(1)[0, :1] + x
    if mesh.downstream is not None:
        mesh.downstream.send(x[:1].expand(1, HIDDEN_SIZE))
    mesh.agree_on_minimum("done", 1)
    return float(x[0])


@pytest.mark.parametrize("nodes", [("a", "a", "b", "b"), ("a", "b", "a", "b"), ("a", "a", "a", "b")])
def test_groups_within_and_across_machines_mix(ranks: RankProcesses, nodes: tuple[str, ...]) -> None:
    assert ranks.run(sums_over_mixed_nodes, tp_size=2, pp_size=2, nodes=nodes) == [3.0, 3.0, 6.0, 6.0]


def test_ranks_that_do_not_come_are_named_with_their_places() -> None:
    rendezvous = open_rendezvous("lonely", size=4)
    place = own_place(0, 2, 2, rendezvous.port, "lonely", form_timeout_s=0.4)
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout) as caught:
        open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)
    assert time.monotonic() - began < 1.5
    assert caught.value.missing == (1, 2, 3)
    rendezvous.close()
    assert str(caught.value).startswith("forming (member): stage 0 tensor rank 1 (rank 1) and stage 1 tensor rank 0")


def test_a_rendezvous_that_is_not_there_is_named() -> None:
    place = own_place(1, 2, 1, 1, "nobody", form_timeout_s=0.5)
    with pytest.raises(PeerLost, match=r"the leader's rendezvous to 127.0.0.1:1: lost stage 0 tensor rank 0"):
        open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)


def bring_nothing(mesh: Mesh) -> int:
    if mesh.spec.rank == 1:
        time.sleep(1.5)
        return -1
    start_clock()
    return mesh.agree_on_minimum("pages", 1, timeout_s=0.5)


def test_a_rank_that_brings_no_value_is_named_at_the_deadline(ranks: RankProcesses) -> None:
    failure, other = ranks.run(bring_nothing, tp_size=2)
    assert other == -1
    assert (failure.kind, failure.missing) == ("CollectiveTimeout", (1,))
    assert "forming (pages): stage 0 tensor rank 1 (rank 1, pid" in failure.message
    assert 0.4 < failure.after_s < 1.4


def lose_rank_1_while_forming(mesh: Mesh) -> int:
    if mesh.spec.rank == 1:
        end_this_process(signal.SIGKILL)
    start_clock()
    return mesh.agree_on_minimum("weights loaded", 1)


def test_a_rank_killed_while_it_loads_is_noticed_by_all_at_once(ranks: RankProcesses) -> None:
    leader, _, third = ranks.run(lose_rank_1_while_forming, tp_size=3, lost=[1])
    assert (leader.kind, leader.missing) == ("PeerLost", (1,))
    assert third.kind == "PeerLost"  # through the leader, which left
    assert max(leader.after_s, third.after_s) < 3.0


def fail_on_rank_1(mesh: Mesh) -> int:
    if mesh.spec.rank == 1:
        raise MemoryError("no room for one sequence")
    start_clock()
    return mesh.agree_on_minimum("pages", 1)


def test_a_rank_that_fails_to_load_does_not_leave_the_others_waiting(ranks: RankProcesses) -> None:
    leader, failed = ranks.run(fail_on_rank_1, tp_size=2)
    assert failed.kind == "MemoryError"
    assert isinstance(leader, Failure)
    assert (leader.kind, leader.missing) == ("PeerLost", (1,))
    assert leader.after_s < 3.0
