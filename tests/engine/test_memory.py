"""How many pages fit, with the numbers in the error when too few do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import pytest
import torch

from shardray.runtime.engine.device_memory import choose_num_pages
from shardray.runtime.engine.memory import MemoryGrant, RankMemory, available_bytes

CPU = torch.device("cpu")
GIB = 1 << 30
MEMORY = RankMemory(page_bytes=1 << 20, block_size=16, max_model_len=100, max_num_seqs=4)


def granted(kv_memory_bytes: int | None) -> MemoryGrant:
    return MemoryGrant(memory_utilization=0.9, kv_memory_bytes=kv_memory_bytes)


def test_what_the_operator_grants_is_used_to_the_last_whole_page() -> None:
    assert choose_num_pages(MEMORY, granted(20 << 20), CPU) == 20
    assert choose_num_pages(MEMORY, granted((9 << 20) - 1), CPU) == 8


def test_more_pages_than_all_sequences_could_fill_are_not_taken() -> None:
    assert MEMORY.pages_of_one == 7
    assert choose_num_pages(MEMORY, granted(GIB), CPU) == 7 * 4


def test_exactly_one_full_sequence_is_enough() -> None:
    assert choose_num_pages(MEMORY, granted(7 << 20), CPU) == 7


def test_less_than_one_sequence_is_refused_with_the_numbers_and_the_fixes() -> None:
    with pytest.raises(MemoryError) as caught:
        choose_num_pages(MEMORY, granted(6 << 20), CPU)
    assert str(caught.value) == (
        "the KV cache of 0.01 GiB holds 96 tokens, less than one sequence of max_model_len 100; lower "
        "model.max_model_len, raise engine.memory_utilization or engine.kv_memory_bytes, or use more shards"
    )


def test_a_rank_without_kv_heads_limits_nobody() -> None:
    memory = dataclasses.replace(MEMORY, page_bytes=0)
    for kv_memory_bytes in (None, 0):
        assert choose_num_pages(memory, granted(kv_memory_bytes), CPU) == memory.most_pages


def test_free_memory_is_shared_by_the_ranks_of_a_machine_after_a_step_has_its_part() -> None:
    page_bytes = available_bytes() // 1000
    memory = dataclasses.replace(MEMORY, page_bytes=page_bytes, max_num_seqs=10_000)
    alone, with_another = MemoryGrant(memory_utilization=0.5), MemoryGrant(memory_utilization=0.5, num_ranks_here=2)
    assert 450 < choose_num_pages(memory, alone, CPU) < 550
    assert 200 < choose_num_pages(memory, with_another, CPU) < 300
    large_steps = dataclasses.replace(memory, step_bytes=100 * page_bytes)
    assert 350 < choose_num_pages(large_steps, alone, CPU) < 450


def test_weights_that_leave_nothing_are_refused_not_counted_negative() -> None:
    memory = dataclasses.replace(MEMORY, step_bytes=10**15)
    with pytest.raises(MemoryError, match=r"0\.00 GiB holds 0 tokens"):
        choose_num_pages(memory, granted(None), CPU)


def write_cgroup(folder: Path, prefix: str, names: tuple[str, str], limit: str, used: int, stat: str) -> Path:
    (folder / prefix).mkdir(exist_ok=True)
    (folder / prefix / names[0]).write_text(f"{limit}\n")
    (folder / prefix / names[1]).write_text(f"{used}\n")
    (folder / prefix / "memory.stat").write_text(stat)
    return folder


def test_a_container_s_limit_counts_with_files_in_cache_as_free(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB // 8}\n"
    write_cgroup(tmp_path, "", ("memory.max", "memory.current"), str(GIB), GIB // 2, stat)
    assert available_bytes(tmp_path) == GIB // 2 + GIB // 8


def test_the_older_cgroups_are_read_too(tmp_path: Path) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_cgroup(tmp_path, "memory", names, str(GIB), GIB // 4, f"total_inactive_file {GIB // 4}\n")
    assert available_bytes(tmp_path) == GIB


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_a_container_without_a_limit_has_what_the_machine_has(tmp_path: Path, limit: str) -> None:
    write_cgroup(tmp_path, "", ("memory.max", "memory.current"), limit, GIB, "inactive_file 0\n")
    assert available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert available_bytes(tmp_path / "none") == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_container_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "", ("memory.max", "memory.current"), str(GIB), 2 * GIB, "")
    assert available_bytes(tmp_path) == 0
