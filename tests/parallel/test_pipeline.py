"""Hand-off of hidden states between two real processes: order, back-pressure, deadlines."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from shardray.parallel.errors import MeshAborted
from shardray.parallel.mesh import Mesh
from shardray.parallel.pipeline import MessagePipe, ShmPipe
from tests.parallel.rank_processes import (
    HIDDEN_SIZE,
    MAX_TOKENS,
    Failure,
    Gone,
    RankProcesses,
    end_this_process,
    start_clock,
)

NODES = {"shm": ("here", "here"), "gloo": ("here", "there")}
KINDS = {"shm": ShmPipe, "gloo": MessagePipe}


def hidden(step: int, num_tokens: int) -> torch.Tensor:
    """(num_tokens, HIDDEN_SIZE) that no other step has"""
    return torch.arange(num_tokens * HIDDEN_SIZE, dtype=torch.float32).view(num_tokens, HIDDEN_SIZE) + 1000 * step


def num_tokens_of(step: int) -> int:
    return 1 + (7 * step) % MAX_TOKENS


def pass_on(mesh: Mesh, kind: str, num_steps: int, slow_stage: int) -> str:
    for pipe in (mesh.upstream, mesh.downstream):
        assert pipe is None or type(pipe) is KINDS[kind]
    for step in range(num_steps):
        expected = hidden(step, num_tokens_of(step))
        if mesh.spec.stage == slow_stage:
            time.sleep(0.001)
        if mesh.upstream is not None:
            received = mesh.upstream.recv(num_tokens_of(step))
            assert torch.equal(received, expected), step
        if mesh.downstream is not None:
            mesh.downstream.send(expected)
    mesh.agree_on_minimum("done", 1)
    return "done"


@pytest.mark.parametrize("slow_stage", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_pass_through_three_stages_in_order(ranks: RankProcesses, kind: str, slow_stage: int) -> None:
    nodes = ("here",) * 3 if kind == "shm" else ("a", "b", "c")
    assert ranks.run(pass_on, kind, 300, slow_stage, tp_size=1, pp_size=3, nodes=nodes) == ["done"] * 3


def send_views(mesh: Mesh) -> str:
    whole = torch.arange(10.0 * HIDDEN_SIZE * 2).view(10, 2 * HIDDEN_SIZE)
    if mesh.downstream is not None:
        mesh.downstream.send(whole[:, ::2])
    else:
        assert mesh.upstream is not None
        assert torch.equal(mesh.upstream.recv(10), whole[:, ::2])
    mesh.agree_on_minimum("done", 1)
    return "done"


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_that_are_not_contiguous_arrive_right(ranks: RankProcesses, kind: str) -> None:
    assert ranks.run(send_views, tp_size=1, pp_size=2, nodes=NODES[kind]) == ["done"] * 2


def fill_up(mesh: Mesh) -> list[float]:
    """The sender's times of four sends; the receiver takes the first at 0.5 s and the second at 1 s."""
    mesh.agree_on_minimum("start", 1)
    times = []
    if mesh.downstream is not None:
        began = time.monotonic()
        for step in range(4):
            mesh.downstream.send(hidden(step, 3))
            times.append(time.monotonic() - began)
    else:
        assert mesh.upstream is not None
        for step in range(4):
            if step < 2:
                time.sleep(0.5)
            assert torch.equal(mesh.upstream.recv(3), hidden(step, 3))
    mesh.agree_on_minimum("done", 1)
    return times


def test_a_sender_waits_once_both_slots_are_full(ranks: RankProcesses) -> None:
    times, _ = ranks.run(fill_up, tp_size=1, pp_size=2, nodes=NODES["shm"])
    assert times[1] < 0.3  # both slots are free
    assert times[2] > 0.4  # the receiver holds the first slot until it asks for the second message
    assert times[2] < times[3] + 0.001


def keep_what_was_received(mesh: Mesh) -> str:
    """A received slot is not overwritten while its receiver computes, however far ahead the sender is."""
    for step in range(20):
        if mesh.downstream is not None:
            mesh.downstream.send(hidden(step, MAX_TOKENS))
        else:
            assert mesh.upstream is not None
            received = mesh.upstream.recv(MAX_TOKENS)
            time.sleep(0.005)
            assert torch.equal(received, hidden(step, MAX_TOKENS)), step
    mesh.agree_on_minimum("done", 1)
    return "done"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_received_stays_until_the_next_receive(ranks: RankProcesses, kind: str) -> None:
    assert ranks.run(keep_what_was_received, tp_size=1, pp_size=2, nodes=NODES[kind]) == ["done"] * 2


def never_send(mesh: Mesh) -> None:
    start_clock()
    if mesh.upstream is not None:
        mesh.upstream.recv(3)
    time.sleep(1.2)


def never_receive(mesh: Mesh) -> None:
    start_clock()
    for step in range(4):
        if mesh.downstream is not None:
            mesh.downstream.send(hidden(step, 3))
    time.sleep(1.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_sends_nothing_is_named_at_the_deadline(ranks: RankProcesses, kind: str) -> None:
    outcomes = ranks.run(never_send, tp_size=1, pp_size=2, nodes=NODES[kind], timeout_s=0.6)
    failure = outcomes[1]
    assert (failure.kind, failure.missing) == ("CollectiveTimeout", (0,))
    assert "tensor rank 0 pipe from stage 0 receive: stage 0 tensor rank 0 (rank 0, pid" in failure.message
    assert 0.5 < failure.after_s < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_takes_nothing_is_named_at_the_deadline(ranks: RankProcesses, kind: str) -> None:
    failure = ranks.run(never_receive, tp_size=1, pp_size=2, nodes=NODES[kind], timeout_s=0.6)[0]
    assert (failure.kind, failure.missing) == ("CollectiveTimeout", (1,))
    assert "stage 1 tensor rank 0 (rank 1, pid" in failure.message


def lose_the_first_stage(mesh: Mesh) -> None:
    if mesh.upstream is None:
        end_this_process(signal.SIGKILL)
    else:
        start_clock()
        mesh.upstream.recv(3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_stage_is_named_long_before_the_deadline(ranks: RankProcesses, kind: str) -> None:
    gone, failure = ranks.run(lose_the_first_stage, tp_size=1, pp_size=2, nodes=NODES[kind], lost=[0])
    assert gone == Gone()
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.missing) == ("PeerLost", (0,))
    assert failure.after_s < 2.0


def abort_a_receive(mesh: Mesh) -> None:
    if mesh.upstream is not None:
        threading.Timer(0.2, mesh.abort).start()
        with pytest.raises(MeshAborted):
            mesh.upstream.recv(3)
    else:
        time.sleep(0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_abort_wakes_a_stage_that_waits(ranks: RankProcesses, kind: str) -> None:
    assert ranks.run(abort_a_receive, tp_size=1, pp_size=2, nodes=NODES[kind]) == [None, None]
