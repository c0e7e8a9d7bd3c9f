"""Attention over pages: the layout of the KV cache, one step's view of it, and a reference that runs on any device.

Legend: T tokens of the step, R rows (sequences), n query heads, g KV heads, d head size, P pages, b tokens a page.

    keys[layer]      (P, g, d, b)      token i of a sequence lies in page block_table[i // b], at i % b
    values[layer]    (P, g, b, d)

What one KV head holds of a page is one tile, which a kernel streams; keys lie so that a vector runs over tokens.

Rows of one token (decodes) come first in a step. The reference gathers a row's pages and calls SDPA;
runtime/model/kernels holds kernels that read the pages in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.runtime.model.spec import Attention


@dataclass(frozen=True)
class AttentionRow:
    """A row of several tokens: tokens [first, first + num_tokens) of the step are the last of ``context_len``."""

    row: int
    first: int
    num_tokens: int
    context_len: int


@dataclass(frozen=True)
class StepView:
    """Where the tokens of one step stand. All tensors are on the shard's device."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    cache_index: Tensor  # (T,) int64: page * b + offset
    num_decodes: int  # rows [0, num_decodes) have one token, token i belongs to row i
    block_tables: Tensor  # (R, max_blocks) int32
    context_lens: Tensor  # (R,) int32, this step's tokens included
    prefills: tuple[AttentionRow, ...]
    sampled_tokens: Tensor  # (S,) int64: tokens of the step whose logits are wanted

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


class KVPages:
    """The pages of the layers and KV heads of one rank. Memory is reserved at once, touched as pages are used."""

    def __init__(
        self, num_layers: int, num_pages: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = (num_layers, num_pages, num_kv_heads)
        self.keys = torch.empty((*shape, head_dim, block_size), dtype=dtype, device=device)
        self.values = torch.empty((*shape, block_size, head_dim), dtype=dtype, device=device)
        self.num_pages = num_pages
        self.block_size = block_size
        self.key_addresses = [layer.data_ptr() for layer in self.keys]
        self.value_addresses = [layer.data_ptr() for layer in self.values]
        self.num_bytes = 2 * self.keys.numel() * self.keys.element_size()

    @staticmethod
    def page_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, keys: Tensor, values: Tensor, cache_index: Tensor) -> None:
        """Store this step's (T, g, d) keys and values."""
        pages, offsets = cache_index // self.block_size, cache_index % self.block_size
        self.keys[layer][pages, :, :, offsets] = keys
        self.values[layer][pages, :, offsets] = values

    def gather(self, layer: int, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
        """One row's keys and values, each (g, context_len, d)."""
        pages = block_table[: -(-context_len // self.block_size)].long()
        keys = self.keys[layer].index_select(0, pages).permute(1, 0, 3, 2).flatten(1, 2)
        values = self.values[layer].index_select(0, pages).transpose(0, 1).flatten(1, 2)
        return keys[:, :context_len], values[:, :context_len]


class PagedAttention:
    """Causal attention of one rank's heads; ``kv_of_head`` maps its query heads to its KV heads, evenly or not."""

    def __init__(self, attention: Attention, kv_of_head: tuple[int, ...], device: torch.device) -> None:
        self.num_heads = len(kv_of_head)
        self.scale = attention.scale
        self._one_to_one = kv_of_head == tuple(range(self.num_heads))
        self._kv_of_head = torch.tensor(kv_of_head, dtype=torch.int64, device=device)
        num_kv_heads = kv_of_head[-1] + 1 if kv_of_head else 0
        edges = [sum(kv < group for kv in kv_of_head) for group in range(num_kv_heads + 1)]
        self.groups = torch.tensor(edges, dtype=torch.int64)  # heads [groups[i], groups[i + 1]) read KV head i

    def __call__(self, queries: Tensor, pages: KVPages, layer: int, view: StepView) -> Tensor:
        """(T, n, d) -> (T, n, d); this step's keys and values are in the pages already."""
        if self.num_heads == 0:
            return queries
        out = torch.empty_like(queries)
        for row, context_len in enumerate(view.context_lens[: view.num_decodes].tolist()):
            part = slice(row, row + 1)
            out[part] = self._attend_row(queries[part], pages, layer, view.block_tables[row], context_len)
        self.attend_prefills(queries, out, pages, layer, view)
        return out

    def attend_prefills(self, queries: Tensor, out: Tensor, pages: KVPages, layer: int, view: StepView) -> None:
        """The rows of several tokens, into ``out``."""
        for row in view.prefills:
            part = slice(row.first, row.first + row.num_tokens)
            out[part] = self._attend_row(queries[part], pages, layer, view.block_tables[row.row], row.context_len)

    def _attend_row(self, queries: Tensor, pages: KVPages, layer: int, block_table: Tensor, context_len: int) -> Tensor:
        keys, values = pages.gather(layer, block_table, context_len)
        if not self._one_to_one:
            keys, values = keys.index_select(0, self._kv_of_head), values.index_select(0, self._kv_of_head)
        num_tokens = queries.shape[0]
        mask = None
        if 1 < num_tokens < context_len:
            mask = torch.ones(num_tokens, context_len, dtype=torch.bool, device=queries.device)
            mask = mask.tril(diagonal=context_len - num_tokens)
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and num_tokens > 1,
            scale=self.scale,
        )
        return out[0].transpose(0, 1)
