"""Ranks on machines of their own (network namespaces), and a network between them that drops every packet."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest
import torch

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import MeshError
from shardray.parallel.mesh import Mesh, Rendezvous, open_mesh
from tests.parallel.rank_processes import HIDDEN_SIZE, MAX_TOKENS, SECRET, own_place

_ADDRESSES = ("10.231.7.1", "10.231.7.2")
_STEP_TIMEOUT_S = 1.5
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Cable:
    """Two namespaces that are joined by a pair of interfaces."""

    names: tuple[str, str]

    def cut(self) -> None:
        """Nothing gets out of the first any more; nobody is told."""
        _ip_tool("tc", "-n", self.names[0], "qdisc", "add", "dev", "v0", "root", "pfifo", "limit", "0")


def _ip_tool(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    mark = secrets.token_hex(3)
    names = (f"shardray-{mark}-0", f"shardray-{mark}-1")
    try:
        _ip_tool("ip", "netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        _ip_tool("ip", "netns", "add", names[1])
        _ip_tool("ip", "link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for index, name in enumerate(names):
            _ip_tool("ip", "-n", name, "address", "add", f"{_ADDRESSES[index]}/24", "dev", f"v{index}")
            for device in (f"v{index}", "lo"):
                _ip_tool("ip", "-n", name, "link", "set", device, "up")
        yield Cable(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _enter(namespace: str) -> None:
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


def _rank(pipe: Connection, namespace: str, rank: int, tp_size: int) -> None:
    """Tells the rendezvous' port (rank 0), then that the mesh is formed, then what ended its work and how soon."""
    torch.set_num_threads(1)
    _enter(namespace)
    if rank == 0:
        rendezvous = Rendezvous(_ADDRESSES[0], Credentials("apart", SECRET), 2)
        pipe.send(rendezvous.port)
    place = own_place(
        rank, tp_size, 2 // tp_size, pipe.recv(), "apart", nodes=("a", "b"), store_host=_ADDRESSES[0],
        bind_host=_ADDRESSES[rank], timeout_s=_STEP_TIMEOUT_S,
    )  # fmt: skip
    mesh = open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)
    pipe.send("formed")
    last = time.monotonic()
    try:
        while True:
            _work(mesh)
            last = time.monotonic()
    except MeshError as error:
        pipe.send((str(error), time.monotonic() - last))


def _work(mesh: Mesh) -> None:
    mesh.tp.all_reduce(torch.ones(1, HIDDEN_SIZE))
    if mesh.upstream is not None:
        mesh.upstream.recv(1)
        mesh.links[0].send(b"done")
    if mesh.downstream is not None:
        mesh.downstream.send(torch.ones(1, HIDDEN_SIZE))
        mesh.links[1].recv(_STEP_TIMEOUT_S)


@pytest.mark.parametrize("tp_size", [2, 1])
def test_a_network_that_drops_packets_is_found_within_the_deadline_and_the_other_rank_named(
    cable: Cable, tp_size: int
) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank, name in enumerate(cable.names):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, name, rank, tp_size), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        port = pipes[0].recv()
        for pipe in pipes:
            pipe.send(port)
        assert [pipe.recv() for pipe in pipes] == ["formed"] * 2
        time.sleep(0.2)
        cable.cut()
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(_STEP_TIMEOUT_S + 10), f"rank {rank} still waits"
            message, after_s = pipe.recv()
            assert after_s < _STEP_TIMEOUT_S + 1
            assert f"(rank {1 - rank}, pid {processes[1 - rank].pid} on {_ADDRESSES[1 - rank]})" in message
    finally:
        for process in processes:
            process.kill()
            process.join()
