"""Steps of attention made by hand: rows of so many tokens at the end of their contexts, on pages in random order."""

from __future__ import annotations

import os

import numpy as np
import torch

from shardray.runtime.model.attention import AttentionRow, AttentionTasks, KVPages, OwnHeads, PagedAttention, StepView
from shardray.runtime.model.kernels.splits import decode_splits, prefill_tiles
from shardray.runtime.model.spec import Attention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def make_step(rows: list[tuple[int, int]], block_size: int, num_pages: int, seed: int = 0) -> StepView:
    """``rows``: (tokens, length of context), those of one token first."""
    counts, lens = np.array(rows).T
    starts = np.cumsum(counts) - counts
    num_blocks = -(-lens.max() // block_size)
    chance = torch.Generator().manual_seed(seed)
    tables = torch.randperm(num_pages, generator=chance)[: len(rows) * num_blocks].view(len(rows), num_blocks).int()
    positions = np.concatenate([np.arange(end - count, end) for count, end in rows])
    pages = tables[np.repeat(np.arange(len(rows)), counts), positions // block_size].long()
    num_decodes = int((counts == 1).sum())
    splits, split_starts = decode_splits(lens[:num_decodes])
    lists = splits, split_starts, prefill_tiles(counts, num_decodes), np.append(starts, counts.sum()).astype(np.int32)
    return StepView(
        token_ids=torch.zeros(len(positions), dtype=torch.int64, device=DEVICE),
        positions=on_device(positions),
        cache_index=(pages * block_size + torch.from_numpy(positions % block_size)).to(DEVICE),
        num_decodes=num_decodes,
        block_tables=tables.to(DEVICE),
        context_lens=on_device(lens.astype(np.int32)),
        prefills=tuple(AttentionRow(i, int(starts[i]), *rows[i]) for i in range(num_decodes, len(rows))),
        sampled_tokens=torch.zeros(0, dtype=torch.int64, device=DEVICE),
        tasks=AttentionTasks(*map(on_device, lists)),
    )


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def one_row(view: StepView, row: int) -> StepView:
    """A row of one token in a step of its own, on the same pages."""
    splits, split_starts = decode_splits(view.context_lens[row : row + 1].cpu().numpy())
    lists = splits, split_starts, np.zeros((0, 2), np.int32), np.array([0, 1], np.int32)
    return StepView(
        view.token_ids[:1], view.positions[row : row + 1], view.cache_index[row : row + 1], 1,
        view.block_tables[row : row + 1], view.context_lens[row : row + 1], (), view.sampled_tokens,
        tasks=AttentionTasks(*map(on_device, lists)),
    )  # fmt: skip


def filled_pages(num_pages: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVPages:
    torch.manual_seed(1)
    pages = KVPages(1, num_pages, block_size, num_kv_heads, head_dim, dtype, DEVICE)
    pages.keys.normal_()
    pages.values.normal_()
    return pages


def in_float32(pages: KVPages) -> KVPages:
    shape = pages.num_pages, pages.block_size, *pages.values.shape[2::2]
    wide = KVPages(1, *shape, torch.float32, DEVICE)
    wide.keys.copy_(pages.keys)
    wide.values.copy_(pages.values)
    return wide


def make_attention(
    kv_of_head: tuple[int, ...], head_dim: int, sinks: torch.Tensor | None = None,
    relative_weight: torch.Tensor | None = None, **features: object,
) -> PagedAttention:  # fmt: skip
    spec = Attention(len(kv_of_head), kv_of_head[-1] + 1, head_dim, head_dim**-0.5, **features)  # type: ignore[arg-type]
    return PagedAttention(spec, OwnHeads(kv_of_head, 0, len(kv_of_head)), DEVICE, sinks, relative_weight)


def check_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
