"""Attention of prompts in bfloat16 on CPUs: against the reference in float32, and to the bit against itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.parallel.kernels import jit
from shardray.parallel.kernels.linear import runs_here
from shardray.runtime.model.attention import AttentionRow, KVPages, OwnHeads, PagedAttention, StepView, list_rows
from shardray.runtime.model.kernels import cpu_attention, cpu_ops, cpu_prefill, page_tiles
from shardray.runtime.model.kernels.cpu_ops import CpuOps
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.spec import Attention

CPU = torch.device("cpu")
NO_IDS = torch.zeros(0, dtype=torch.int64)
VARIANTS = [name for name in ("pairs", "halves", "narrow") if runs_here(name)]
RowSizes = list[tuple[int, int]]  # (tokens, context they are the last of)


@pytest.fixture(params=VARIANTS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuOps:
    kernel = jit.compile_kernel(cpu_prefill.prefill, cpu_prefill.make_variant(request.param))
    monkeypatch.setattr(cpu_ops, "_compile_prefill", lambda dtype: kernel)
    page_element = page_tiles.PAIRS if request.param == "pairs" else page_tiles.HALVES
    variant = cpu_attention.make_variant(jit.BFLOAT16, page_element, 2 if request.param == "narrow" else 4)
    decode = jit.compile_kernel(cpu_attention.decode, variant)
    monkeypatch.setattr(cpu_ops, "_compile_decode", lambda dtype, page_element: decode)
    return CpuOps(torch.bfloat16, 2)


class Case:
    """Rows of some sizes, their queries, and pages in random order that hold rubbish wherever no context reaches."""

    def __init__(
        self, kv_of_head: tuple[int, ...], head_dim: int, block_size: int, sizes: RowSizes, causal: bool = True
    ) -> None:
        torch.manual_seed(len(sizes))
        self.sizes = sizes
        num_heads, num_kv_heads = len(kv_of_head), kv_of_head[-1] + 1
        spec = Attention(
            num_heads, num_kv_heads, head_dim, head_dim**-0.5, qkv_bias=False, out_bias=False, causal=causal
        )
        self.attention = PagedAttention(spec, OwnHeads(kv_of_head, 0, num_heads), CPU)
        num_blocks = max(-(-context_len // block_size) for _, context_len in sizes)
        num_pages = num_blocks * len(sizes) + 2
        self.pages = KVPages(1, num_pages, block_size, num_kv_heads, head_dim, torch.bfloat16, CPU)
        self.pages.keys.normal_()
        self.pages.values.normal_()
        self.tables = torch.randperm(num_pages)[: num_blocks * len(sizes)].view(len(sizes), num_blocks).int()
        for table, (_, context_len) in zip(self.tables, sizes, strict=True):
            if beyond := context_len % block_size:
                page = int(table[context_len // block_size])
                self.pages.keys[0, page, :, :, beyond:] = torch.nan
                self.pages.values[0, page, :, beyond:] = torch.inf
        fused = torch.randn(sum(count for count, _ in sizes), num_heads + 2 * num_kv_heads, head_dim)
        self.queries = fused.bfloat16()[:, :num_heads]  # rows with a stride of their own

    def view(self, sizes: RowSizes | None = None) -> StepView:
        rows, first = [], 0
        sizes = sizes or self.sizes
        for row, (count, context_len) in enumerate(sizes):
            if count > 1:
                rows.append(AttentionRow(row, first, count, context_len))
            first += count
        context_lens = torch.tensor([context_len for _, context_len in sizes], dtype=torch.int32)
        num_decodes = sum(count == 1 for count, _ in sizes)
        return StepView(
            NO_IDS, NO_IDS, NO_IDS, num_decodes, self.tables, context_lens, tuple(rows), NO_IDS,
            row_list=list_rows(num_decodes, rows),
        )  # fmt: skip

    def attend(self, ops: Ops) -> torch.Tensor:
        return ops.attend(self.attention, self.queries, self.pages, 0, self.view())

    def reference(self) -> torch.Tensor:
        pages = copy.copy(self.pages)
        pages.keys, pages.values = pages.keys.float(), pages.values.float()
        return Ops().attend(self.attention, self.queries.float(), pages, 0, self.view())


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 4e-3, error
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(
    ("kv_of_head", "head_dim", "block_size"),
    [
        ((0, 0, 0, 1, 1, 1, 2, 2, 2), 64, 16),
        ((0, 0, 0, 1, 1), 64, 32),  # a rank's share of the above
        ((0, 1, 2, 3), 128, 16),
        ((0,) * 71, 64, 16),
        ((0, 0, 1, 1), 80, 16),
        ((0, 1), 48, 128),
    ],
    ids=str,
)
def test_it_equals_the_reference(
    ops: CpuOps, kv_of_head: tuple[int, ...], head_dim: int, block_size: int, causal: bool
) -> None:
    sizes = [(1, 5), (1, 130), (2, 2), (17, 17), (129, 129), (40, 300), (33, 500)]
    case = Case(kv_of_head, head_dim, block_size, sizes, causal)
    check_close(case.attend(ops), case.reference())


@given(
    sizes=st.lists(
        st.tuples(st.integers(2, 150), st.integers(0, 300)).map(lambda pair: (pair[0], sum(pair))),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=25)
def test_rows_of_any_length_anywhere_in_their_context_equal_the_reference(sizes: RowSizes) -> None:
    case = Case((0, 0, 1), 32, 16, sizes)
    check_close(case.attend(CpuOps(torch.bfloat16, 2)), case.reference())


def test_a_prompt_gets_the_same_bits_however_it_is_cut_and_whoever_shares_the_step(ops: CpuOps) -> None:
    case = Case((0, 0, 0, 1, 1), 64, 16, [(200, 200), (90, 130)])
    together = case.attend(ops)
    for begin, end in ((0, 200), (0, 2), (2, 77), (77, 200)):
        view = case.view([(end - begin, end)])
        alone = ops.attend(case.attention, case.queries[begin:end], case.pages, 0, view)
        assert torch.equal(alone, together[begin:end]), (begin, end)


@pytest.mark.parametrize(
    ("kv_of_head", "head_dim", "block_size"),
    [((0, 0, 0, 1, 1), 64, 16), ((0, 1, 1, 1, 1, 1, 1), 128, 32), ((0, 0), 80, 48), ((0,), 16, 128)],
    ids=str,
)
def test_a_token_gets_the_same_bits_whether_it_is_sampled_or_read(
    ops: CpuOps, kv_of_head: tuple[int, ...], head_dim: int, block_size: int
) -> None:
    num_tokens = 300
    case = Case(kv_of_head, head_dim, block_size, [(num_tokens, num_tokens)])
    read = case.attend(ops)
    for position in (0, 1, 15, 16, 17, 62, 63, 64, 100, 126, 127, 128, 129, 143, 191, 256, 270, 298, 299):
        view = case.view([(1, position + 1)])
        sampled = ops.attend(case.attention, case.queries[position : position + 1], case.pages, 0, view)
        assert torch.equal(sampled[0], read[position]), position


def test_scores_that_are_far_apart_neither_overflow_nor_vanish(ops: CpuOps) -> None:
    case = Case((0, 0), 64, 16, [(150, 150)])
    case.queries *= 60.0
    found = case.attend(ops)
    assert found.isfinite().all()
    check_close(found, case.reference())


def test_a_rank_whose_kv_head_nobody_reads_computes_the_others() -> None:
    case = Case((1, 1), 64, 16, [(40, 40)])
    check_close(case.attend(CpuOps(torch.bfloat16, 2)), case.reference())
