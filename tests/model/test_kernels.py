"""The compiled CPU kernels against the torch reference that they replace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.runtime.model.attention import KVPages, OwnHeads, PagedAttention, StepView, list_rows
from shardray.runtime.model.kernels import cpu_ops, page_tiles
from shardray.runtime.model.kernels.cpu_ops import CpuOps
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.spec import Attention, Norm

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BLOCK_SIZE = 16


def own_heads(kv_of_head: tuple[int, ...]) -> OwnHeads:
    return OwnHeads(kv_of_head, 0, len(kv_of_head))


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def make_view(context_lens: list[int], num_pages: int, starts: list[int] | None = None) -> StepView:
    """Rows of one token each at the end of their contexts, on pages in random order."""
    num_blocks = -(-max(context_lens) // BLOCK_SIZE)
    tables = torch.randperm(num_pages)[: len(context_lens) * num_blocks].view(len(context_lens), num_blocks).int()
    positions = torch.tensor(context_lens) - 1
    rows = torch.arange(len(context_lens))
    pages = tables[rows, positions // BLOCK_SIZE].long()
    return StepView(
        token_ids=torch.zeros(len(context_lens), dtype=torch.int64),
        positions=positions,
        cache_index=pages * BLOCK_SIZE + positions % BLOCK_SIZE,
        num_decodes=len(context_lens),
        block_tables=tables.contiguous(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        prefills=(),
        sampled_tokens=rows,
        row_list=list_rows(len(context_lens), ()),
    )


def filled_pages(num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVPages:
    pages = KVPages(1, num_pages, BLOCK_SIZE, num_kv_heads, head_dim, dtype, CPU)
    pages.keys.normal_()
    pages.values.normal_()
    return pages


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    context_lens=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    kv_of_head=st.sampled_from([(0,), (0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 1, 1), (0,) * 7]),
    head_dim=st.sampled_from([16, 64, 80]),
    num_threads=st.sampled_from([1, 2]),
)
@settings(max_examples=40)
def test_decode_attention_equals_the_reference(
    dtype: torch.dtype, context_lens: list[int], kv_of_head: tuple[int, ...], head_dim: int, num_threads: int
) -> None:
    torch.manual_seed(len(context_lens))
    num_kv_heads = kv_of_head[-1] + 1
    pages = filled_pages(64, num_kv_heads, head_dim, dtype)
    spec = Attention(len(kv_of_head), num_kv_heads, head_dim, head_dim**-0.5, qkv_bias=False, out_bias=False)
    attention = PagedAttention(spec, own_heads(kv_of_head), CPU)
    view = make_view(context_lens, num_pages=64)
    fused = torch.randn(len(context_lens), len(kv_of_head) + 2, head_dim).to(dtype)  # rows with a stride of their own
    queries = fused[:, : len(kv_of_head)]
    expected = Ops().attend(attention, queries.float(), as_float(pages), 0, view).to(dtype)
    check_close(CpuOps(dtype, num_threads).attend(attention, queries, pages, 0, view), expected)


def test_bfloat16_pages_are_read_on_processors_that_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = filled_pages(64, 2, 80, torch.bfloat16)
    attention = PagedAttention(Attention(5, 2, 80, 0.125), own_heads((0, 0, 0, 1, 1)), CPU)
    view = make_view([33, 5, 64, 1], num_pages=64)
    queries = torch.randn(4, 5, 80).bfloat16()
    monkeypatch.setattr(cpu_ops, "_page_element", lambda dtype: page_tiles.HALVES)
    expected = Ops().attend(attention, queries.float(), as_float(pages), 0, view).bfloat16()
    check_close(CpuOps(torch.bfloat16, 2).attend(attention, queries, pages, 0, view), expected)


def as_float(pages: KVPages) -> KVPages:
    wide = KVPages(1, pages.num_pages, BLOCK_SIZE, *pages.values.shape[2::2], torch.float32, CPU)
    wide.keys.copy_(pages.keys)
    wide.values.copy_(pages.values)
    return wide


def test_a_row_of_attention_is_the_same_bits_in_any_batch() -> None:
    pages = filled_pages(64, 3, 64, torch.bfloat16)
    attention = PagedAttention(Attention(9, 3, 64, 0.125), own_heads((0, 0, 0, 1, 1, 1, 2, 2, 2)), CPU)
    view = make_view([33, 5, 64, 17], num_pages=64)
    queries = torch.randn(4, 9, 64).bfloat16()
    together = CpuOps(torch.bfloat16, 2).attend(attention, queries, pages, 0, view)
    for row in range(4):
        alone = StepView(
            view.token_ids[:1], view.positions[:1], view.cache_index[:1], 1, view.block_tables[row : row + 1],
            view.context_lens[row : row + 1], (), view.sampled_tokens[:1], row_list=list_rows(1, ()),
        )  # fmt: skip
        assert torch.equal(
            CpuOps(torch.bfloat16, 1).attend(attention, queries[row : row + 1], pages, 0, alone)[0], together[row]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context_len", [1, 3, 4, 16, 17])
def test_what_a_page_holds_beyond_the_context_does_not_matter(dtype: torch.dtype, context_len: int) -> None:
    pages = filled_pages(4, 1, 16, dtype)
    attention = PagedAttention(Attention(1, 1, 16, 0.25), own_heads((0,)), CPU)
    view = make_view([context_len], num_pages=4)
    queries = torch.randn(1, 1, 16).to(dtype)
    before = CpuOps(dtype, 1).attend(attention, queries, pages, 0, view)
    if filled := context_len % BLOCK_SIZE:
        page = int(view.block_tables[0, -1])
        pages.keys[0, page, ..., filled:] = float("nan")
        pages.values[0, page, :, filled:] = float("nan")
    assert not before.isnan().any()
    assert torch.equal(CpuOps(dtype, 1).attend(attention, queries, pages, 0, view), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm_equals_the_reference(dtype: torch.dtype, num_tokens: int, with_delta: bool) -> None:
    norm = NormWeights(Norm("rms", eps=1e-5), torch.rand(72) + 0.5, None)
    x, delta = torch.randn(num_tokens, 72).to(dtype), torch.randn(num_tokens, 72).to(dtype)
    addend = delta if with_delta else None
    expected = Ops().add_norm(norm, x.clone(), addend)
    found = CpuOps(dtype, 2).add_norm(norm, x.clone(), addend)
    for one, other in zip(found, expected, strict=True):
        check_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotate_and_store_equals_the_reference(dtype: torch.dtype, rotary_dim: int) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim = 40, 5, 2, 16
    view = make_view([1 + index for index in range(num_tokens)], num_pages=256)
    angle = torch.rand(num_tokens, rotary_dim // 2) * 6
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    pages = [KVPages(1, 256, BLOCK_SIZE, num_kv_heads, head_dim, dtype, CPU) for _ in range(2)]
    for one in pages:
        one.keys.zero_()
        one.values.zero_()
    angles = Angles(angle.cos(), angle.sin())
    expected = Ops().rotate_and_store(qkv.clone(), num_heads, angles, pages[0], 0, view)
    found = CpuOps(dtype, 2).rotate_and_store(qkv.clone(), num_heads, angles, pages[1], 0, view)
    check_close(found, expected)
    check_close(pages[1].keys, pages[0].keys)
    assert torch.equal(pages[1].values, pages[0].values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gated_silu_equals_the_reference_at_any_magnitude(dtype: torch.dtype) -> None:
    inner = torch.cat([torch.randn(20, 64) * scale for scale in (0.01, 1.0, 30.0, 1000.0)]).to(dtype)
    check_close(CpuOps(dtype, 2).activate(inner, "silu", gated=True), Ops().activate(inner, "silu", gated=True))


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place() -> None:
    import numba

    from shardray.parallel.kernels import jit

    @numba.njit(fastmath=jit.MATH)
    def exponentials(values: np.ndarray) -> None:
        for i in range(values.shape[0]):
            values[i] = jit.exp(values[i])

    points = np.linspace(-87.0, 88.0, 20_001, dtype=np.float32)
    values = points.copy()
    exponentials(values)
    assert np.max(np.abs(values / np.exp(points.astype(np.float64)) - 1.0)) < 3e-7
