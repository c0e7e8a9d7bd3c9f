"""Memory that is kept for long: where it lies, and when it is given back."""

from __future__ import annotations

import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from shardray.parallel import arena, huge_pages

MANY_BYTES = 96 << 20


def own_kib(field: str) -> int:
    return sum(map(int, re.findall(rf"^{field}: +(\d+)", Path("/proc/self/smaps").read_text(), re.MULTILINE)))


def test_tensors_are_contiguous_aligned_and_do_not_overlap() -> None:
    tensors = [arena.empty((3, size), torch.bfloat16) for size in (1, 40, 700, 1 << 20)]
    for number, tensor in enumerate(tensors):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert [{*tensor.flatten().tolist()} for tensor in tensors] == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert arena.empty((0, 4), torch.float32).shape == (0, 4)


@pytest.mark.parametrize("num_tensors", [1, 6], ids=["larger than a chunk", "of several chunks"])
def test_memory_goes_with_the_last_tensor_in_it(num_tensors: int) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:  # this one may have half a chunk
        held_kib, left_kib = other.submit(_hold, num_tensors).result(timeout=60)
    assert held_kib > 0.9 * MANY_BYTES / 1024
    assert left_kib < 0.75 * MANY_BYTES / 1024  # what the last chunk has is there for the next tensor


def _hold(num_tensors: int) -> tuple[int, int]:
    """How much a process grows by tensors of so many bytes, and by what is left of it without them; KiB."""
    before = own_kib("Rss")
    tensors = [arena.empty((MANY_BYTES // num_tensors,), torch.uint8).fill_(1) for _ in range(num_tensors)]
    held = own_kib("Rss")
    tensors.clear()
    gc.collect()
    return held - before, own_kib("Rss") - before


@pytest.mark.skipif(not huge_pages.are_there(), reason="the system gives no huge pages")
def test_it_comes_in_huge_pages() -> None:
    before = own_kib("AnonHugePages")
    tensor = arena.empty((MANY_BYTES,), torch.uint8).fill_(1)
    assert own_kib("AnonHugePages") - before > tensor.numel() // 1024 // 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always within_size advise [never] deny force\n", False),
        ("always within_size advise never [deny] force\n", False),
        ("always within_size [advise] never deny force\n", True),
        (None, False),
    ],
)
def test_whether_shared_memory_has_them_is_what_the_system_says(
    text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shmem_enabled"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(huge_pages, "_SHARED_MEMORY", file)
    assert huge_pages.can_be_shared.__wrapped__() == expected
