"""Attention over pages: the layout of the KV cache, one step's view of it, and a reference that runs on any device.

Legend: T tokens of the step, R rows (sequences), n query heads, g KV heads, d head size, P pages, b tokens a page.

    keys[layer]      (P, g, d, b)      token i of a sequence lies in page block_table[i // b], at i % b
    values[layer]    (P, g, b, d)

What one KV head holds of a page is one tile, which a kernel streams. Keys lie so that a vector runs over tokens; on
CUDA they lie as values do, (P, g, b, d): tensor cores take tiles either way round, and a token is read in whole lines.

Rows of one token (decodes) come first in a step. The reference gathers a row's pages and calls SDPA;
runtime/model/kernels holds kernels that read the pages in place.

Where a prompt is an encoder's, the pages that a slot is given first hold what cross-attention reads of it. Encoder
layers themselves keep nothing: all of a stage use the same pages of one layer, anew in every step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel import arena
from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.relative import bias_by_distance
from shardray.runtime.model.spec import Attention, Pooling


@dataclass(frozen=True)
class AttentionRow:
    """A row of several tokens: tokens [first, first + num_tokens) of the step are the last of ``context_len``."""

    row: int
    first: int
    num_tokens: int
    context_len: int


@dataclass(frozen=True)
class AttentionTasks:
    """What CUDA kernels do for the rows of a step, as lists: see runtime/model/kernels/splits.py. All int32."""

    splits: Tensor  # (W, 2), or more: row and split of each task of a decode; those after the last row's are not read
    split_starts: Tensor  # (D + 1,), of D decodes: those of row i are splits [split_starts[i], split_starts[i + 1])
    tiles: Tensor  # (N, 2): row and first token of each task of a prefill
    query_starts: Tensor  # (R + 1,): the tokens of row i are [query_starts[i], query_starts[i + 1]) of the step


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
    prompts: PromptsView | None = None  # with an encoder
    tasks: AttentionTasks | None = None  # for the kernels of CUDA
    row_list: Tensor | None = None  # for the kernels of CPUs: see ``list_rows``

    @property
    def num_tokens(self) -> int:
        """All tokens of the step, those of prompts that an encoder reads included."""
        encoded = None if self.prompts is None else self.prompts.encoded
        return self.token_ids.shape[0] + (0 if encoded is None else encoded.token_ids.shape[0])


@dataclass(frozen=True)
class PromptsView:
    """What a step has to do with an encoder's prompts. S tokens of them are read in it."""

    encoded: StepView | None  # their rows, in pages of the encoder's own
    cache_index: Tensor  # (S,) int64: where cross-attention's keys and values of them go
    seen: StepView  # the rows of the step, and for each the pages of its own prompt
    pooled: tuple[Pooling, ...]  # for each row of ``encoded``, where embeddings are wanted of them


def list_rows(num_decodes: int, prefills: Sequence[AttentionRow]) -> Tensor:
    """What kernels of CPUs read of the rows of a step, so that one recording serves any: (1 + rows, 4) int64.

    First the number of rows of one token and that of rows of several; then of each of those what AttentionRow has.
    """
    rows = [(row.row, row.first, row.num_tokens, row.context_len) for row in prefills]
    return torch.tensor([(num_decodes, len(rows), 0, 0), *rows])


class KVPages:
    """The pages of the layers and KV heads of one rank. Memory is reserved at once, touched as pages are used.

    ``keys_by_token``: keys are (P, g, b, d), like values.
    """

    def __init__(
        self, num_layers: int, num_pages: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = (num_layers, num_pages, num_kv_heads)
        self.keys_by_token = device.type == "cuda" or runs_triton(device)
        tile = (block_size, head_dim) if self.keys_by_token else (head_dim, block_size)
        self.keys = _empty((*shape, *tile), dtype, device)
        self.values = _empty((*shape, block_size, head_dim), dtype, device)
        self.num_pages = num_pages
        self.block_size = block_size
        self.key_addresses = [layer.data_ptr() for layer in self.keys]
        self.value_addresses = [layer.data_ptr() for layer in self.values]
        self.num_bytes = 2 * self.keys.numel() * self.keys.element_size()

    def write(self, layer: int, keys: Tensor, values: Tensor, cache_index: Tensor) -> None:
        """Store this step's (T, g, d) keys and values."""
        pages, offsets = cache_index // self.block_size, cache_index % self.block_size
        self._keys_as_columns(layer)[pages, :, :, offsets] = keys
        self.values[layer][pages, :, offsets] = values

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """In all layers, put what each of some pages holds into another one, of which none is among the sources.

        Both (N,) int64 on the device.
        """
        for held in (self.keys, self.values):
            held[:, targets] = held[:, sources]

    def gather(self, layer: int, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
        """One row's keys and values, each (g, context_len, d)."""
        pages = block_table[: -(-context_len // self.block_size)].long()
        keys = self._keys_as_columns(layer).index_select(0, pages).permute(1, 0, 3, 2).flatten(1, 2)
        values = self.values[layer].index_select(0, pages).transpose(0, 1).flatten(1, 2)
        return keys[:, :context_len], values[:, :context_len]

    def _keys_as_columns(self, layer: int) -> Tensor:
        """(P, g, d, b), however they lie"""
        return self.keys[layer].transpose(2, 3) if self.keys_by_token else self.keys[layer]


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return arena.empty(shape, dtype)
    return torch.empty(*shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class OwnHeads:
    """The heads of one rank: for each query head the index of its KV head here; where they stand in the whole model."""

    kv_of_head: tuple[int, ...]
    first_head: int
    num_heads_in_all: int
    first_new_kv_head: int = 0  # here; those before it are also held by a rank before

    @classmethod
    def of(cls, plan: ShardPlan, tp_rank: int) -> OwnHeads:
        own = plan.kv_heads[tp_rank]
        held_before = max((held.stop for held in plan.kv_heads[:tp_rank] if held), default=0)  # some ranks have none
        shared = max(0, held_before - own.start) if own else 0
        return cls(plan.kv_of_heads(tp_rank), plan.heads[tp_rank].start, plan.sizes.num_heads, shared)


class PagedAttention:
    """Attention of one rank's heads over their pages."""

    def __init__(
        self, attention: Attention, heads: OwnHeads, device: torch.device, sinks: Tensor | None = None,
        relative: Tensor | None = None,
    ) -> None:  # fmt: skip
        """``sinks``: (n,), and ``relative``: (buckets, n), if the attention has them."""
        kv_of_head = heads.kv_of_head
        self.num_heads = len(kv_of_head)
        self.scale = attention.scale
        self.sinks = None if sinks is None else sinks.float()[:, None, None]
        unlike = attention.alibi, attention.window, attention.softcap, sinks, relative
        self.is_plain = all(feature is None for feature in unlike)
        self.causal = attention.causal
        self.window, self.softcap = attention.window, attention.softcap
        self.slopes: Tensor | None = None  # (n, 1, 1)
        if attention.alibi is not None:
            slopes = alibi_slopes(heads.num_heads_in_all)[heads.first_head : heads.first_head + self.num_heads]
            self.slopes = attention.alibi * slopes.to(device)[:, None, None]
        self.biases: Tensor | None = None  # (n, 2 m + 1): of distances from -m to m
        if attention.relative is not None and relative is not None:
            self.biases = bias_by_distance(attention.relative, attention.causal, relative).to(device)
        self._one_to_one = kv_of_head == tuple(range(self.num_heads))
        self.kv_of_head = torch.tensor(kv_of_head, dtype=torch.int64, device=device)
        num_kv_heads = kv_of_head[-1] + 1 if kv_of_head else 0
        edges = [sum(kv < group for kv in kv_of_head) for group in range(num_kv_heads + 1)]
        # heads [groups[i], groups[i + 1]) read KV head i
        self.groups = torch.tensor(edges, dtype=torch.int64, device=device)
        self.largest_group = max((end - start for start, end in itertools.pairwise(edges)), default=0)

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
            keys, values = keys.index_select(0, self.kv_of_head), values.index_select(0, self.kv_of_head)
        queries = queries.transpose(0, 1)
        if self.softcap is not None or self.sinks is not None:
            return self._attend_by_scores(queries, keys, values).transpose(0, 1)
        num_tokens = queries.shape[1]
        causal = self.causal and self.is_plain and num_tokens == context_len
        needs_none = causal or (self.is_plain and (num_tokens == 1 or not self.causal))
        mask = None if needs_none else self._mask(num_tokens, context_len, queries)
        out = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, is_causal=causal and num_tokens > 1,
            scale=self.scale,
        )  # fmt: skip
        return out[0].transpose(0, 1)

    def _attend_by_scores(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(n, T, d) queries against (n, context, d): what SDPA does, with scores capped and sinks among them."""
        scores = queries.float() @ keys.float().transpose(1, 2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = self._mask(queries.shape[1], keys.shape[1], scores)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
        scores = scores + mask
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.expand(-1, scores.shape[1], -1)), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]]
        return (weights @ values.float()).to(queries.dtype)

    def _mask(self, num_tokens: int, context_len: int, like: Tensor) -> Tensor:
        """What the last ``num_tokens`` tokens of a context see: (num_tokens, context_len) bool, or (n, ...) to add."""
        ends = torch.arange(context_len - num_tokens, context_len, device=like.device)[:, None]
        distance = ends - torch.arange(context_len, device=like.device)
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen &= distance.abs() < self.window
        if self.slopes is not None:
            bias = -self.slopes * distance
        elif self.biases is not None:
            furthest = self.biases.shape[1] // 2
            bias = self.biases[:, distance.clamp(-furthest, furthest) + furthest]
        else:
            return seen
        return bias.masked_fill(~seen, -torch.inf).to(like.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """(num_heads,) float32: a geometric sequence, filled up from that of twice as many heads (arXiv 2108.12409)."""
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return torch.tensor(slopes + between)
