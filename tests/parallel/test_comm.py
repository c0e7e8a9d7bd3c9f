"""Collectives among real processes: exact sums, the same bits everywhere, with and without compiled kernels."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from shardray.parallel.comm import SoloComm
from shardray.parallel.gloo import GlooComm
from shardray.parallel.mesh import Mesh
from shardray.parallel.shm import ShmComm
from tests.parallel.rank_processes import (
    RankProcesses,
    another_mesh,
)

SLOT_BYTES = 4 << 20
KINDS = {"shm": ShmComm, "gloo": GlooComm}


def nodes(kind: str, size: int) -> tuple[str, ...]:
    return ("here",) * size if kind == "shm" else tuple(f"node {rank}" for rank in range(size))


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def exact_sum(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """In float32 and in rank order, rounded once."""
    total = part_of(0, shape, dtype, seed).float()
    for rank in range(1, size):
        total = total + part_of(rank, shape, dtype, seed).float()
    return total.to(dtype)


def check_backend(mesh: Mesh, kind: str) -> None:
    assert type(mesh.tp) is KINDS[kind], type(mesh.tp)


def reduce_many_shapes(mesh: Mesh, kind: str) -> str:
    check_backend(mesh, kind)
    shapes = [(1,), (3,), (7, 5), (0,), (4, 0), (1, 576), (33, 129), (101, 997), (SLOT_BYTES // 4 + 12_345,)]
    for seed, shape in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = mesh.tp.all_reduce(part_of(mesh.tp.rank, shape, dtype, seed))
            assert found.dtype == dtype
            assert torch.equal(found, exact_sum(mesh.tp.size, shape, dtype, seed)), (shape, dtype)
    return "done"


def reduce_special_values(mesh: Mesh, kind: str) -> str:
    check_backend(mesh, kind)
    highest, lowest = 3.38e38, 1e-40
    own = [math.inf, math.inf, math.nan, highest, highest, -0.0, lowest, 1.0]
    others = [-math.inf, 1.0, 0.0, highest, -highest, -0.0, lowest, 2.0**-9]
    for dtype in (torch.float32, torch.bfloat16):
        parts = [torch.tensor(values, dtype=dtype) for values in (own, others)]
        expected = (parts[0].float() + parts[1].float()).to(dtype)
        found = mesh.tp.all_reduce(parts[mesh.tp.rank].clone())
        assert torch.equal(found.isnan(), expected.isnan()), (found, expected)
        numbers, bits = ~expected.isnan(), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(found[numbers].view(bits), expected[numbers].view(bits)), (found, expected)
    return "done"


def use_rows_that_are_not_contiguous(mesh: Mesh, kind: str) -> str:
    comm, shape = mesh.tp, (6, 10)
    whole = part_of(comm.rank, shape, torch.float32, 1)
    expected = exact_sum(comm.size, shape, torch.float32, 1)
    assert torch.equal(comm.all_reduce(whole.t()), expected.t())
    whole = part_of(comm.rank, shape, torch.float32, 1)
    assert torch.equal(comm.all_reduce(whole[:, 2:7]), expected[:, 2:7])
    target = torch.zeros(4, 9) if comm.rank else torch.arange(36.0).view(4, 9)
    comm.broadcast(target[:, 1:5])
    assert torch.equal(target[:, 1:5], torch.arange(36.0).view(4, 9)[:, 1:5])
    assert comm.rank == 0 or not target[:, 5:].any()
    rows = part_of(comm.rank, (5, 8), torch.float32, 2)
    gathered = comm.gather(rows[:, 1:4], [3] * comm.size)
    if comm.rank == 0:
        parts = [part_of(rank, (5, 8), torch.float32, 2)[:, 1:4] for rank in range(comm.size)]
        assert torch.equal(gathered, torch.cat(parts, dim=1))
    return "done"


def gather_widths(mesh: Mesh, widths: list[int], rows: int) -> str:
    comm = mesh.tp
    for dtype in (torch.float32, torch.bfloat16):
        found = comm.gather(part_of(comm.rank, (rows, widths[comm.rank]), dtype, 5), widths)
        if comm.rank != 0:
            assert found is None
            continue
        expected = torch.cat([part_of(rank, (rows, width), dtype, 5) for rank, width in enumerate(widths)], dim=1)
        assert found is not None
        assert torch.equal(found, expected)
    comm.all_reduce(torch.zeros(1))  # a rank with nothing to give would leave while another is still being connected
    return "done"


def all_gather_many_shapes(mesh: Mesh) -> str:
    comm = mesh.tp
    for seed, shape in enumerate([(1,), (0, 2), (5, 2), (3, 1, 7)]):
        for dtype in (torch.float64, torch.int64, torch.bfloat16):
            parts = [(part_of(rank, shape, torch.float32, seed) * 1000).to(dtype) for rank in range(comm.size)]
            assert torch.equal(comm.all_gather(parts[comm.rank]), torch.stack(parts)), (shape, dtype)
    columns = part_of(comm.rank, (4, 6), torch.float32, 9)[:, 1:3]
    expected = [part_of(rank, (4, 6), torch.float32, 9)[:, 1:3] for rank in range(comm.size)]
    assert torch.equal(comm.all_gather(columns), torch.stack(expected))
    return "done"


def broadcast_many_shapes(mesh: Mesh) -> str:
    comm = mesh.tp
    for seed, shape in enumerate([(1,), (0,), (5, 7), (SLOT_BYTES // 8 + 77,)]):
        for dtype in (torch.int64, torch.float32, torch.bfloat16):
            expected = (part_of(0, shape, torch.float32, seed) * 1000).to(dtype)
            x = expected.clone() if comm.rank == 0 else torch.zeros(shape, dtype=dtype)
            assert torch.equal(comm.broadcast(x), expected)
    return "done"


def mix_operations(mesh: Mesh, num_operations: int, naps: bool) -> int:
    """A pseudorandom sequence of operations that every rank knows; each rank dawdles at moments of its own."""
    comm, chance, own = mesh.tp, random.Random(3), random.Random(mesh.tp.rank)
    digest = 0
    for seed in range(num_operations):
        if naps and own.random() < 0.01:
            time.sleep(0.002)
        rows, width = chance.randrange(0, 4), chance.randrange(1, 40)
        match chance.randrange(4):
            case 0:
                x = torch.full((rows, width), float(comm.rank * 10_000 + seed))
                total = sum(rank * 10_000 + seed for rank in range(comm.size))
                assert torch.equal(comm.all_reduce(x), torch.full((rows, width), float(total))), seed
                digest ^= hash((seed, total))
            case 1:
                x = torch.full((rows, width), float(seed if comm.rank == 0 else -1))
                assert torch.equal(comm.broadcast(x), torch.full((rows, width), float(seed))), seed
            case 2:
                x = torch.full((rows, width), float(comm.rank * 10_000 + seed))
                ranks = torch.arange(comm.size).view(-1, 1, 1) * 10_000.0
                assert torch.equal(comm.all_gather(x), (ranks + seed).expand(-1, rows, width)), seed
            case _:
                widths = [(width + 3 * rank) % 7 for rank in range(comm.size)]
                out = comm.gather(torch.full((rows, widths[comm.rank]), float(comm.rank + seed)), widths)
                if out is not None:
                    expected = [torch.full((rows, w), float(rank + seed)) for rank, w in enumerate(widths)]
                    assert torch.equal(out, torch.cat(expected, dim=1)), seed
    return digest


def bits_of_sums(mesh: Mesh) -> list[bytes]:
    sums = [
        mesh.tp.all_reduce(part_of(mesh.tp.rank, (count,), dtype, count))
        for count in (1, 17, 1000, 40_000)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return [total.view(torch.uint8).numpy().tobytes() for total in sums]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_exact_in_float32_and_rank_order_for_any_shape(ranks: RankProcesses, kind: str, size: int) -> None:
    done = ranks.run(reduce_many_shapes, kind, tp_size=size, nodes=nodes(kind, size))
    assert done == ["done"] * size


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_nan_and_the_ends_of_the_range_are_summed_like_other_numbers(
    ranks: RankProcesses, kind: str
) -> None:
    assert ranks.run(reduce_special_values, kind, tp_size=2, nodes=nodes(kind, 2)) == ["done"] * 2


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_views_that_are_not_contiguous_are_safe(ranks: RankProcesses, kind: str, size: int) -> None:
    done = ranks.run(use_rows_that_are_not_contiguous, kind, tp_size=size, nodes=nodes(kind, size))
    assert done == ["done"] * size


@pytest.mark.parametrize(
    ("widths", "rows"),
    [([3, 5], 4), ([0, 5], 3), ([5, 0], 3), ([0, 0], 3), ([4, 4], 0), ([7, 0, 1], 5), ([3, 1, 0, 2, 8], 6)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_uneven_and_zero_width_are_gathered(
    ranks: RankProcesses, kind: str, widths: list[int], rows: int
) -> None:
    size = len(widths)
    assert ranks.run(gather_widths, widths, rows, tp_size=size, nodes=nodes(kind, size)) == ["done"] * size


@pytest.mark.parametrize("kind", KINDS)
def test_logits_larger_than_a_slot_are_gathered_in_pieces(ranks: RankProcesses, kind: str) -> None:
    widths = [30_001, 29_999, 0]
    assert ranks.run(gather_widths, widths, 50, tp_size=3, nodes=nodes(kind, 3)) == ["done"] * 3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broadcast_carries_any_dtype_and_length(ranks: RankProcesses, kind: str, size: int) -> None:
    assert ranks.run(broadcast_many_shapes, tp_size=size, nodes=nodes(kind, size)) == ["done"] * size


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_what_every_rank_has(ranks: RankProcesses, kind: str, size: int) -> None:
    assert ranks.run(all_gather_many_shapes, tp_size=size, nodes=nodes(kind, size)) == ["done"] * size


LONG_RUNS = [pytest.param(kind, size, 20_000, marks=pytest.mark.slow) for kind in KINDS for size in (2, 3, 5)]


@pytest.mark.parametrize(
    ("kind", "size", "count"), [("shm", 2, 3000), ("shm", 3, 2000), ("shm", 5, 400), ("gloo", 3, 500), *LONG_RUNS]
)
def test_thousands_of_mixed_operations_keep_their_order(ranks: RankProcesses, kind: str, size: int, count: int) -> None:
    digests = ranks.run(mix_operations, count, True, tp_size=size, nodes=nodes(kind, size))
    assert all(isinstance(digest, int) for digest in digests), digests
    assert len(set(digests)) == 1


def test_a_sum_has_the_same_bits_on_every_rank_and_over_shared_memory_and_tcp(ranks: RankProcesses) -> None:
    bits = [found for kind in KINDS for found in ranks.run(bits_of_sums, tp_size=3, nodes=nodes(kind, 3))]
    assert len(bits) == 6
    assert all(found == bits[0] for found in bits)


@contextmanager
def mesh_without_numba(mesh: Mesh, ranks: list[int]) -> Iterator[Mesh]:
    """Another mesh of the same ranks, of which ``ranks`` find no numba."""
    hidden = {"numba": None} if mesh.spec.rank in ranks else {}
    with ExitStack() as until_closed:
        with mock.patch.dict(sys.modules, hidden):
            mixed = until_closed.enter_context(another_mesh(mesh, f"{mesh.spec.epoch}-mixed"))
        yield mixed


def use_mesh_without_numba(mesh: Mesh, ranks: list[int]) -> int:
    with mesh_without_numba(mesh, ranks) as mixed:
        reduce_many_shapes(mixed, "shm")
        gather_widths(mixed, [7, 0, 1], 5)
        broadcast_many_shapes(mixed)
        all_gather_many_shapes(mixed)
        return mix_operations(mixed, 300, naps=True)


@pytest.mark.parametrize("without", [[0, 1, 2], [1], [0, 2]])
def test_ranks_with_and_without_numba_understand_each_other(ranks: RankProcesses, without: list[int]) -> None:
    digests = ranks.run(use_mesh_without_numba, without, tp_size=3, nodes=nodes("shm", 3))
    assert all(isinstance(digest, int) for digest in digests), digests
    assert len(set(digests)) == 1


def test_a_group_of_one_takes_the_same_path() -> None:
    comm = SoloComm()
    x = torch.ones(3)
    assert comm.all_reduce(x) is x
    assert comm.broadcast(x) is x
    assert comm.gather(x, [3]) is x
    comm.abort()
    comm.close()
