"""Launches that are recorded and run again: the same numbers for new inputs, also where ranks wait for each other."""

from __future__ import annotations

import itertools
import signal
import time

import pytest
import torch
from torch import Tensor

from shardray.parallel.kernels.linear import PackedLinear, cpu_features, variant_for
from shardray.parallel.kernels.program import Recorder
from shardray.parallel.mesh import Mesh
from tests.parallel.rank_processes import Gone, RankProcesses, end_this_process, start_clock
from tests.parallel.test_comm import nodes

NUM_RUNS = 40


def make_linears(*sizes: int) -> list[PackedLinear]:
    torch.manual_seed(3)
    variant = variant_for(cpu_features()) or "halves"
    return [PackedLinear(torch.randn(n, k).bfloat16() / 8, None, variant) for k, n in itertools.pairwise(sizes)]


def pass_through(linears: list[PackedLinear], x: Tensor) -> Tensor:
    for linear in linears:
        x = linear(x)
    return x


def test_a_program_gives_what_its_launches_gave_one_by_one() -> None:
    linears, x, recorder = make_linears(32, 48, 80, 16), torch.randn(3, 32).bfloat16(), Recorder()
    with torch.inference_mode():
        out, program = recorder.record(lambda: pass_through(linears, x))
        assert program is not None
        assert torch.equal(out, pass_through(linears, x))
        for _ in range(3):
            x.copy_(torch.randn(3, 32))
            program.run()
            assert torch.equal(out, pass_through(linears, x))


def test_programs_of_several_sizes_share_memory_and_stay_right() -> None:
    linears, recorder = make_linears(32, 48, 80, 16), Recorder()
    inputs = [torch.randn(rows, 32).bfloat16() for rows in (2, 7, 1)]
    with torch.inference_mode():
        recorded = [recorder.record(lambda x=x: pass_through(linears, x)) for x in inputs]
        for x, (out, program) in zip(inputs, recorded, strict=True):
            assert program is not None
            program.run()
            assert torch.equal(out, pass_through(linears, x))


def test_what_torch_computes_is_not_recorded() -> None:
    (linear,), x, recorder = make_linears(32, 48), torch.randn(3, 32).bfloat16(), Recorder()
    with torch.inference_mode():
        out, program = recorder.record(lambda: linear(x) * 2)
        assert program is None
        assert torch.equal(out, linear(x) * 2)


def test_nothing_is_recorded_once_it_is_over() -> None:
    (linear,), x, recorder = make_linears(32, 48), torch.randn(3, 32).bfloat16(), Recorder()
    with torch.inference_mode():
        out, program = recorder.record(lambda: linear(x))
        assert program is not None
        before = out.clone()
        linear(torch.randn(5, 32).bfloat16())
        program.run()
        assert torch.equal(out, before)


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_a_team_gives_the_same_bits_every_time_whoever_is_late(num_threads: int) -> None:
    """More threads than cores, so that some of them are always taken off theirs in the middle of something."""
    linears, x, recorder = make_linears(64, 1600, 576, 1600, 576, 1600, 16), torch.randn(9, 64).bfloat16(), Recorder()
    before = torch.get_num_threads()

    def pass_by_turns(x: Tensor) -> Tensor:
        """Launches of the whole team and of one thread alternate."""
        for linear, threads in zip(linears, itertools.cycle((num_threads, num_threads, 1)), strict=False):
            torch.set_num_threads(threads)
            x = linear(x)
        return x

    try:
        with torch.inference_mode():
            out, program = recorder.record(lambda: pass_by_turns(x))
            assert program is not None
            for _ in range(200):
                x.copy_(torch.randn(9, 64))
                out.zero_()
                program.run()
                assert torch.equal(out, pass_by_turns(x))
    finally:
        torch.set_num_threads(before)


def sum_again_and_again(mesh: Mesh, late_rank: int) -> str:
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    (linear,) = make_linears(64, 64)
    recorder = Recorder()
    with torch.inference_mode():
        out, program = recorder.record(lambda: mesh.tp.all_reduce(linear(mesh.tp.all_reduce(x))))
        assert program is not None
        for i in range(NUM_RUNS):
            x.fill_(mesh.spec.tp_rank + i)
            if mesh.spec.tp_rank == late_rank:
                time.sleep(0.02 * (i % 3))
            program.run()
            total = torch.full((2, 64), float(sum(rank + i for rank in range(mesh.spec.tp_size)))).bfloat16()
            expected = linear(total).float() * mesh.spec.tp_size
            assert torch.equal(out, expected.bfloat16()), i
            mesh.tp.broadcast(torch.ones(3))  # operations besides those of the program
    return "done"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_recorded_sums_of_ranks_are_right_whoever_is_late(ranks: RankProcesses, size: int) -> None:
    assert ranks.run(sum_again_and_again, size - 1, tp_size=size, nodes=nodes("shm", size)) == ["done"] * size


def lose_rank_1_in_a_program(mesh: Mesh, how: signal.Signals) -> None:
    x = torch.ones(64, dtype=torch.bfloat16)
    with torch.inference_mode():
        _, program = Recorder().record(lambda: mesh.tp.all_reduce(x))
        assert program is not None
        program.run()
        if mesh.spec.tp_rank == 1:
            end_this_process(how)
        start_clock()
        program.run()


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, "PeerLost"), (signal.SIGSTOP, "CollectiveTimeout")])
def test_a_rank_lost_in_a_program_is_named(ranks: RankProcesses, how: signal.Signals, kind: str) -> None:
    outcomes = ranks.run(lose_rank_1_in_a_program, how, tp_size=2, nodes=nodes("shm", 2), timeout_s=0.8, lost=[1])
    assert outcomes[1] == Gone() or how is signal.SIGSTOP
    assert (outcomes[0].kind, outcomes[0].missing) == (kind, (1,))
    assert outcomes[0].after_s < 3.0
