"""Attention kernels against the torch reference, computed in float32 on the same pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.kernels import choose_ops
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.kernels.splits import SPLIT, TILE
from shardray.runtime.model.kernels.triton_ops import TritonOps
from shardray.runtime.model.positions import Relative
from tests.kernels.steps import (
    DEVICE,
    DTYPES,
    check_close,
    filled_pages,
    in_float32,
    make_attention,
    make_step,
    normal,
    one_row,
)

HEADS = {
    "one to one": (0, 1, 2),
    "grouped": (0, 0, 0, 1, 1, 1),
    "all on one": (0,) * 7,
    "uneven": (0, 0, 0, 1),
    "one that nobody reads": (0, 0, 2),
    "more than a tile": (0,) * 18 + (1,),
}
DECODES = [(1, 1), (1, 17), (1, SPLIT), (1, SPLIT + 1), (1, 2 * SPLIT + 70)]
MIXED = [(1, 5), (1, SPLIT + 40), (7, 90), (33, 33), (TILE + 3, TILE + 60)]
FEATURES: dict[str, dict[str, Any]] = {
    "window of a few": {"window": 9},
    "window over a split": {"window": SPLIT + 30},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": 1.0},
    "all three": {"window": 70, "softcap": 5.0, "alibi": 1.0},
    "not causal": {"causal": False},
    "not causal, a window": {"causal": False, "window": 20},
}


def check(attention: PagedAttention, view: StepView, pages: KVPages, dtype: torch.dtype) -> None:
    num_heads, head_dim = attention.num_heads, pages.values.shape[-1]
    torch.manual_seed(2)
    fused = normal(len(view.positions), num_heads + 2, head_dim, dtype=dtype)  # rows with a stride of their own
    queries = fused[:, :num_heads]
    expected = Ops().attend(attention, queries.float(), in_float32(pages), 0, view)
    check_close(TritonOps().attend(attention, queries, pages, 0, view), expected, dtype)


def test_these_are_the_operations_of_a_device_that_triton_runs_on() -> None:
    assert isinstance(choose_ops(DEVICE, torch.bfloat16, 1), TritonOps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_decodes_and_prompts_equal_the_reference_at_any_head_size(head_dim: int, dtype: torch.dtype) -> None:
    pages = filled_pages(160, 16, 2, head_dim, dtype)
    check(make_attention((0, 0, 0, 1, 1), head_dim), make_step(MIXED, 16, 160), pages, dtype)


@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("heads", HEADS)
def test_decodes_equal_the_reference_for_any_heads(heads: str, block_size: int) -> None:
    pages = filled_pages(256, block_size, HEADS[heads][-1] + 1, 24, torch.float32)
    check(make_attention(HEADS[heads], 24), make_step(DECODES, block_size, 256), pages, torch.float32)


@pytest.mark.parametrize("feature", FEATURES)
def test_masks_and_scores_of_every_kind_equal_the_reference(feature: str) -> None:
    view = make_step([*DECODES, *MIXED[2:]], 16, 512)
    pages = filled_pages(512, 16, 2, 32, torch.float32)
    check(make_attention((0, 0, 1), 32, **FEATURES[feature]), view, pages, torch.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_biases_by_distance_equal_the_reference(causal: bool) -> None:
    relative = Relative(num_buckets=8, max_distance=20)
    attention = make_attention((0, 1), 16, relative_weight=normal(8, 2), relative=relative, causal=causal)
    check(attention, make_step(MIXED, 16, 160), filled_pages(160, 16, 2, 16, torch.float32), torch.float32)


@pytest.mark.parametrize("window", [None, 40])
def test_sinks_equal_the_reference(window: int | None) -> None:
    pages = filled_pages(160, 16, 2, 32, torch.float32)
    attention = make_attention((0, 0, 1), 32, sinks=torch.tensor([3.0, -1.0, 8.0], device=DEVICE), window=window)
    check(attention, make_step(MIXED, 16, 160), pages, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_a_decode_is_the_same_bits_in_any_batch(dtype: torch.dtype, window: int | None) -> None:
    pages = filled_pages(256, 16, 2, 64, dtype)
    attention = make_attention((0, 0, 0, 1), 64, window=window)
    view = make_step([*DECODES, (40, 60)], 16, 256)
    queries = normal(len(view.positions), 4, 64, dtype=dtype)
    together = TritonOps().attend(attention, queries, pages, 0, view)
    for row in range(view.num_decodes):
        alone = TritonOps().attend(attention, queries[row : row + 1], pages, 0, one_row(view, row))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_is_the_same_bits_in_any_chunks(dtype: torch.dtype) -> None:
    pages = filled_pages(32, 16, 2, 64, dtype)
    attention = make_attention((0, 0, 1), 64)
    length = TILE + 90
    whole = make_step([(length, length)], 16, 32)
    queries = normal(length, 3, 64, dtype=dtype)
    expected = TritonOps().attend(attention, queries, pages, 0, whole)
    for cut in (17, TILE, TILE + 50):
        last = make_step([(length - cut, length)], 16, 32)
        assert torch.equal(last.block_tables, whole.block_tables)
        assert torch.equal(TritonOps().attend(attention, queries[cut:], pages, 0, last), expected[cut:])


def test_what_a_page_holds_beyond_the_context_does_not_matter() -> None:
    pages = filled_pages(4, 16, 1, 16, torch.float32)
    attention, view = make_attention((0,), 16), make_step([(1, 3), (2, 5)], 16, 4)
    queries = normal(3, 1, 16)
    before = TritonOps().attend(attention, queries, pages, 0, view)
    for table, length in zip(view.block_tables.long(), view.context_lens.tolist(), strict=True):
        pages.keys[0, table, :, length:] = float("nan")
        pages.values[0, table, :, length:] = float("nan")
    assert torch.equal(TritonOps().attend(attention, queries, pages, 0, view), before)


def test_a_row_without_a_context_gives_zeros() -> None:
    """As the rows that fill up a recorded step do."""
    pages = filled_pages(8, 16, 1, 16, torch.float32)
    view = make_step([(1, 3), (1, 1)], 16, 8)
    view.context_lens[1] = 0
    assert view.tasks is not None
    view.tasks.split_starts[2] = 1
    out = TritonOps().attend(make_attention((0,), 16), normal(2, 1, 16), pages, 0, view)
    assert out[0].isfinite().all()
    assert torch.equal(out[1], torch.zeros(1, 16, device=DEVICE))
