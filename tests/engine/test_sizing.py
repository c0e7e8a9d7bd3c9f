"""What is planned is what hosts report, and what is said to help does help."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardray.parallel.layers import is_packed
from shardray.runtime.engine.hardware import Hardware
from shardray.runtime.engine.obstacles import remedies, shortage
from shardray.runtime.engine.served import ServedSpec, read_served
from shardray.runtime.engine.shapes import cut, shapes_within
from shardray.runtime.engine.sizing import HostMemory, Load, PlannedMesh, candidates, fewest_hosts, plan_mesh
from shardray.runtime.model.sources import resolve_model
from tests.ranks import RankPool
from tests.tiny_models import save_llama

GIB = 1 << 30
BOUNDS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16}
H100 = Hardware.of(memory_bytes_per_s=3.35e12, flops_per_s=989e12, link_bytes_per_s=450e9, message_s=3e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def served_of(folder: Path, dtype: str = "float32", max_model_len: int = 512, **bounds: int) -> ServedSpec:
    return read_served(folder, dtype, max_model_len, SimpleNamespace(**BOUNDS | bounds))


def offer_of(served: ServedSpec, num_bytes: int = GIB, **fields: object) -> HostMemory:
    offer = HostMemory("cpu", num_bytes, False, is_packed("cpu", served.dtype), 0.9)
    return dataclasses.replace(offer, **fields)  # type: ignore[arg-type]


def assert_as_reported(pool: RankPool, folder: Path, dtype: str, shape: tuple[int, int], **fields: object) -> None:
    served = served_of(folder, dtype)
    offer = offer_of(served, 64 * GIB, kv_memory_bytes=fields.get("kv_memory_bytes"))
    planned = plan_mesh(served, cut(served.spec, *shape, False), offer)
    with pool.mesh(folder, *shape, dtype=dtype, max_model_len=512, **BOUNDS, **fields) as mesh:
        for host, info in zip(planned.hosts, mesh.infos, strict=True):
            assert (host.stage, host.tp_rank, host.num_heads) == (info.stage, info.tp_rank, info.num_heads)
            assert host.memory.weight_bytes == info.weight_bytes
            assert planned.kv_bytes(host) == info.kv_bytes
            assert planned.num_kv_tokens == info.num_kv_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_hosts_report_what_was_planned(pool: RankPool, folder: Path, shape: tuple[int, int], dtype: str) -> None:
    assert_as_reported(pool, folder, dtype, shape, kv_memory_bytes=None)
    assert_as_reported(pool, folder, dtype, shape, kv_memory_bytes=1_100_000)


def test_replicas_that_share_weights_leave_more_for_pages(folder: Path) -> None:
    served = served_of(folder, max_num_seqs=100_000)
    plan, machine = cut(served.spec, 2, 1, False), offer_of(served, 4 * GIB, is_shared=True)
    shared = dataclasses.replace(machine, shares_weights=True)
    alone = [plan_mesh(served, plan, offer, 1).hosts for offer in (machine, shared)]
    assert alone[0] == alone[1], "a single replica shares with nobody"
    each, once = (plan_mesh(served, plan, offer, 3).hosts[0].room_bytes for offer in (machine, shared))
    of_weights = sum(host.memory.weight_bytes for host in alone[0])
    assert once - each == pytest.approx(0.9 * 2 * of_weights / 6, abs=2)


def test_hosts_of_a_real_model_report_what_was_planned(pool: RankPool) -> None:
    real = resolve_model("smollm2-135m")
    assert_as_reported(pool, real, "auto", (2, 1), kv_memory_bytes=32 << 20)


def test_what_hosts_share_is_divided_among_all_of_every_replica(folder: Path) -> None:
    served = served_of(folder, max_num_seqs=100_000)
    plan, offer = cut(served.spec, 2, 1, False), offer_of(served, 16 * GIB, is_shared=True)
    alone, two = plan_mesh(served, plan, offer), plan_mesh(served, plan, offer, replicas=2)
    assert alone.num_kv_tokens > 2 * two.num_kv_tokens > 0
    taken = sum(alone.kv_bytes(host) + host.memory.loaded_bytes + host.runtime_bytes for host in alone.hosts)
    assert 0.8 * 16 * GIB < taken < 16 * GIB


def test_a_gpu_keeps_free_what_may_not_be_used(folder: Path) -> None:
    served = served_of(folder, max_num_seqs=1_000_000)
    mesh = plan_mesh(served, cut(served.spec, 1, 1, False), offer_of(served, 24 * GIB, device_type="cuda"))
    host = mesh.hosts[0]
    in_use = mesh.kv_bytes(host) + host.memory.loaded_bytes + host.runtime_bytes + host.memory.step_bytes
    assert 0.9 * 24 * GIB - host.memory.page_bytes <= in_use <= 0.9 * 24 * GIB


def too_large(folder: Path, spare_bytes: int = 0, **bounds: int) -> tuple[ServedSpec, PlannedMesh, HostMemory]:
    """One host that lacks exactly one byte, or has some to spare."""
    served = served_of(folder, **bounds)
    plan, ample = cut(served.spec, 1, 1, False), offer_of(served, memory_utilization=1.0)
    host = plan_mesh(served, plan, ample).hosts[0]
    needed = host.memory.loaded_bytes + host.runtime_bytes + host.memory.step_bytes + host.memory.sequence_bytes
    offer = dataclasses.replace(ample, num_bytes=needed - 1 + spare_bytes)
    return served, plan_mesh(served, plan, offer), offer


def test_one_byte_decides(folder: Path) -> None:
    assert too_large(folder, spare_bytes=1)[1].num_full_sequences == 1.0
    mesh = too_large(folder)[1]
    assert (mesh.fits, mesh.num_kv_tokens, mesh.tightest.missing_bytes) == (False, 0, 1)


def test_every_remedy_helps(folder: Path) -> None:
    served, mesh, offer = too_large(folder, max_num_batched_tokens=1024)
    assert "stage 0 tensor rank 0 lacks 0.00 GiB: weights 0.00 GiB, a step" in shortage(mesh, offer)
    told = remedies(served, mesh, offer)
    plan = mesh.plan
    window = int(one(told, r"model.max_model_len to (\d+)"))
    assert plan_mesh(dataclasses.replace(served, max_model_len=window), plan, offer).fits
    assert not plan_mesh(dataclasses.replace(served, max_model_len=window + 16), plan, offer).fits
    tokens = int(one(told, r"engine.max_num_batched_tokens to (\d+)"))
    assert plan_mesh(dataclasses.replace(served, max_num_batched_tokens=tokens), plan, offer).fits
    assert one(told, r"set model.dtype to (\w+)") == "bfloat16"
    assert plan_mesh(dataclasses.replace(served, dtype_name="bfloat16"), plan, offer).fits
    num_hosts = int(one(told, r"use (\d+) hosts"))
    assert fewest_hosts(served, offer, False, num_hosts - 1) is None


def test_too_small_a_grant_of_kv_memory_is_what_stands_in_the_way(folder: Path) -> None:
    served = served_of(folder)
    offer = offer_of(served, kv_memory_bytes=1000)
    mesh = plan_mesh(served, cut(served.spec, 1, 1, False), offer)
    told = remedies(served, mesh, offer)
    granted = int(one(told, r"engine.kv_memory_bytes to (\d+)MiB")) << 20
    assert plan_mesh(served, mesh.plan, dataclasses.replace(offer, kv_memory_bytes=granted)).fits


def test_hosts_too_small_for_anything_are_told_so(folder: Path) -> None:
    served = served_of(folder)
    offer = offer_of(served, 1 << 20)
    mesh = plan_mesh(served, cut(served.spec, 1, 1, False), offer)
    assert remedies(served, mesh, offer) == [
        "no single setting and no 64 such hosts are enough; use hosts with more memory"
    ]


def one(lines: list[str], pattern: str) -> str:
    (found,) = [match[1] for line in lines if (match := re.search(pattern, line))]
    return found


def test_shapes_are_all_that_the_hosts_allow() -> None:
    assert set(shapes_within(4, 2)) == {(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)}


def test_the_best_shape_fits_and_decodes_most(folder: Path) -> None:
    served, load = served_of(folder), Load(num_seqs=8, context_len=256, prompt_len=256)
    found = candidates(served, 4, offer_of(served), load, H100, False)
    assert len(found) == len(shapes_within(4, 5))
    rates = [shape.decode_tokens_per_s for shape in found]
    assert rates == sorted(rates, reverse=True)
    assert found[0].mesh.fits


def test_a_model_that_needs_two_hosts_is_not_put_on_one(folder: Path) -> None:
    served, _, offer = too_large(folder)
    found = candidates(served, 2, offer, Load(8, 256, 256), H100, False)
    assert [shape.mesh.fits for shape in found] == [True, True, False]
    assert found[-1].mesh.plan.tp_size == found[-1].mesh.plan.pp_size == 1
    assert found[-1].rates is None


def test_without_speeds_the_order_is_that_of_smaller_shapes_for_a_degraded_fleet(folder: Path) -> None:
    served = served_of(folder)
    found = candidates(served, 3, offer_of(served), Load(8, 256, 256), None, False)
    assert [(one.mesh.plan.tp_size, one.mesh.plan.pp_size) for one in found] == [(3, 1), (1, 3), (2, 1), (1, 2), (1, 1)]
