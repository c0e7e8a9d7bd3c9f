"""Strangers at the ports of ranks that form meshes and compute: refused, told of once, and of no consequence."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import CollectiveTimeout
from shardray.parallel.greeting import LinkListener
from shardray.parallel.mesh import Mesh, Rendezvous
from shardray.parallel.place import Member
from shardray.parallel.strangers import Strangers
from tests.parallel.rank_processes import LOOPBACK, RankProcesses, another_mesh
from tests.strangers import GREETINGS, besieged, call, listeners_of, until_shut_out


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    rendezvous = Rendezvous(LOOPBACK, Credentials("e", "s"), 2)
    yield rendezvous
    rendezvous.close()


@pytest.mark.parametrize("kind", GREETINGS)
def test_every_stranger_is_shut_out_and_told_of_with_its_address(
    rendezvous: Rendezvous, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.WARNING)
    sock = call((LOOPBACK, rendezvous.port), GREETINGS[kind], "127.0.0.9")
    assert sock is not None
    address, port = sock.getsockname()
    assert until_shut_out(sock, 8.0)
    sock.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"refused a rendezvous connection from {address}:{port}: ")


def test_a_flood_from_one_address_is_two_lines(rendezvous: Rendezvous, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    flood = [call((LOOPBACK, rendezvous.port), GREETINGS["http"], "127.0.0.9", 5.0) for _ in range(300)]
    assert all(sock is not None and until_shut_out(sock, 8.0) for sock in flood)
    rendezvous.close()
    deadline = time.monotonic() + 3.0  # the rest is told by the thread that accepted, as it ends
    while len(caplog.records) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [record.getMessage().partition(" from ")[0] for record in caplog.records] == [
        "refused a rendezvous connection",
        "refused 299 more rendezvous connections",
    ]


def test_more_silent_ones_than_can_wait_push_out_the_oldest() -> None:
    listener = LinkListener(LOOPBACK, Credentials("e", "s"))
    with ThreadPoolExecutor(1) as threads:
        accepting = threads.submit(listener.accept, [Member(1, 0, 1)], 3.0, 1.0)
        flood = [call((LOOPBACK, listener.port), b"") for _ in range(600)]
        first = flood[0]
        assert first is not None
        assert until_shut_out(first, 1.0), "long before its five seconds are over"
        with pytest.raises(CollectiveTimeout, match="rank 1"):
            accepting.result()
    listener.close()
    for sock in flood:
        if sock is not None:
            sock.close()


def test_addresses_are_remembered_up_to_a_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    strangers = Strangers("test")
    for number in range(1000):
        for _ in range(2):
            strangers.refuse(f"10.0.{number // 256}.{number % 256}:1", "garbage")
    assert len(strangers._told) <= 257
    strangers.close()
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("refused 1 more") for line in lines) == 1000


def form_and_sum(mesh: Mesh, times: int) -> list[float]:
    """Meshes are formed one after the other, and compute."""
    sums = []
    for turn in range(times):
        if mesh.spec.rank == 1:
            time.sleep(0.2)  # the doors stay open until all have come
        with another_mesh(mesh, f"{mesh.spec.epoch}-{turn}") as again:
            for _ in range(100):
                x = again.tp.all_reduce(torch.full((8,), float(mesh.spec.rank + 1)))
            sums.append(float(x[0]))
            again.agree_on_minimum("closing", turn)
    return sums


@pytest.mark.parametrize("nodes", [("a", "a"), ("a", "b")], ids=["shm", "gloo"])
def test_meshes_form_and_compute_while_strangers_call_at_every_port(
    ranks: RankProcesses, nodes: tuple[str, ...]
) -> None:
    pids = [ranks.pid(rank) for rank in range(2)]
    with besieged(lambda: listeners_of(pids)) as calls:
        assert ranks.run(form_and_sum, 12, tp_size=2, nodes=nodes) == [[3.0] * 12] * 2
    assert len(calls) >= 4, "ports of several meshes were open long enough to be found"
    assert {host for host, _ in calls} == {LOOPBACK}


def what_listens(mesh: Mesh) -> set[tuple[str, int]]:
    mesh.agree_on_minimum("all formed", 1)
    found = listeners_of([os.getpid()])
    mesh.agree_on_minimum("all looked", 1)
    return found


def test_a_formed_mesh_of_one_machine_listens_nowhere(ranks: RankProcesses) -> None:
    assert ranks.run(what_listens, tp_size=2, pp_size=2) == [set()] * 4


def test_between_machines_only_gloo_listens_and_only_on_the_address_given(ranks: RankProcesses) -> None:
    found = ranks.run(what_listens, tp_size=2, pp_size=2, nodes=("a", "b", "c", "d"), bind_host="127.0.0.1")
    assert {host for listeners in found for host, _ in listeners} <= {LOOPBACK}
