"""Runs step plans on one rank: keeps the slot table that plans fill, lays a plan out as tensors, runs the layers.

Legend: T tokens of the step, R rows, S sampling rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from shardray.parallel.errors import MeshError
from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.parallel.mesh import Mesh
from shardray.parallel.spans import SpanKind, Spans
from shardray.runtime.engine.sampler import Sampler
from shardray.runtime.engine.step import PageGrant, Row, SlotStart, StepPlan, StepResult
from shardray.runtime.engine.traced import StageTime
from shardray.runtime.model.attention import AttentionRow, AttentionTasks, KVPages, PromptsView, StepView
from shardray.runtime.model.decoder import ShardedDecoder
from shardray.runtime.model.kernels.splits import decode_splits, prefill_tiles


class SlotTable:
    """What the deltas of the plans add up to: the pages of each slot, and the token it sampled last.

    ``max_prompt_len``: with an encoder, of the prompts that it reads; their pages are a slot's first ones.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device,
        max_prompt_len: int | None = None,
    ) -> None:  # fmt: skip
        self._block_size = block_size
        self._device = device
        self._has_prompts = max_prompt_len is not None
        num_blocks = -(-max_model_len // block_size) - (-(max_prompt_len or 0) // block_size)
        self._pages = np.zeros((max_num_seqs, num_blocks), dtype=np.int32)
        self._prompt_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def grant(self, grants: Sequence[PageGrant]) -> None:
        for grant in grants:
            self._pages[grant.slot, grant.first_block : grant.first_block + len(grant.pages)] = grant.pages

    def start(self, starts: Sequence[SlotStart]) -> None:
        for start in starts:
            self._prompt_blocks[start.slot] = start.num_prompt_blocks

    def set_last_tokens(self, slots: Sequence[int], tokens: Tensor) -> None:
        self._last_tokens[torch.tensor(slots, device=self._device)] = tokens

    def view(self, plan: StepPlan) -> StepView:
        """The plan as tensors; rows of one token first, otherwise in the plan's order."""
        rows = sorted(plan.rows, key=lambda row: row.num_tokens > 1)
        counts = np.array([row.num_tokens for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        ends = np.cumsum(counts)  # of each row's tokens, in the step
        tables = self._tables(slots, starts + counts)
        last_token = {row.slot: int(end) - 1 for row, end in zip(rows, ends, strict=True)}
        sampled = np.array([last_token[row.slot] for row in plan.rows if row.samples], np.int64)
        view = self._view(self._token_ids(rows, ends), counts, starts, tables, int((counts == 1).sum()), sampled)
        if not self._has_prompts:
            return view
        return dataclasses.replace(view, prompts=self._prompts(plan, view, slots, counts))

    def _tables(self, slots: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """(R, blocks): the pages of what each row has itself."""
        num_blocks = -(-int(lens.max(initial=0)) // self._block_size)
        tables: np.ndarray = self._pages[slots, :num_blocks]
        if self._has_prompts:
            last = self._pages.shape[1] - 1
            blocks = np.minimum(self._prompt_blocks[slots, None] + np.arange(num_blocks), last)
            tables = self._pages[slots[:, None], blocks]
        return tables

    def _view(
        self, token_ids: Tensor, counts: np.ndarray, starts: np.ndarray, tables: np.ndarray, num_decodes: int,
        sampled: np.ndarray,
    ) -> StepView:  # fmt: skip
        ends = np.cumsum(counts)
        positions = np.arange(len(token_ids)) - np.repeat(ends - counts - starts, counts)
        pages = tables[np.repeat(np.arange(len(counts)), counts), positions // self._block_size]
        return StepView(
            token_ids=token_ids,
            positions=self._tensor(positions),
            cache_index=self._tensor(pages.astype(np.int64) * self._block_size + positions % self._block_size),
            num_decodes=num_decodes,
            block_tables=self._tensor(tables),
            context_lens=self._tensor((starts + counts).astype(np.int32)),
            prefills=tuple(
                AttentionRow(i, int(ends[i] - counts[i]), int(counts[i]), int(starts[i] + counts[i]))
                for i in range(num_decodes, len(counts))
            ),
            sampled_tokens=self._tensor(sampled),
            tasks=self._tasks(counts, starts + counts, num_decodes),
        )

    def _tasks(self, counts: np.ndarray, context_lens: np.ndarray, num_decodes: int) -> AttentionTasks | None:
        """Of rows of so many tokens at the end of their contexts; None where no kernel takes them."""
        if not runs_triton(self._device):
            return None
        splits, split_starts = decode_splits(context_lens[:num_decodes])
        query_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        lists = splits, split_starts, prefill_tiles(counts, num_decodes), query_starts
        return AttentionTasks(*map(self._tensor, lists))

    def _prompts(self, plan: StepPlan, view: StepView, slots: np.ndarray, counts: np.ndarray) -> PromptsView:
        rows = plan.encoder_rows
        encoded, cache_index = None, view.cache_index[:0]
        if rows:
            places = np.array([row.slot for row in rows], dtype=np.int64)
            lens = self._prompt_lens[places] = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
            token_ids = self._tensor(np.array([token for row in rows for token in row.token_ids], dtype=np.int64))
            blocks, begin = (lens + self._block_size - 1) // self._block_size, np.zeros_like(lens)
            of_encoder = (np.cumsum(blocks) - blocks)[:, None] + np.arange(int(blocks.max()))
            encoded = self._view(token_ids, lens, begin, of_encoder.astype(np.int32), 0, begin[:0])
            own = self._pages[places, : int(blocks.max())]
            cache_index = self._view(token_ids, lens, begin, own, 0, begin[:0]).cache_index
        prompt_lens = self._prompt_lens[slots]
        seen = dataclasses.replace(
            view,
            block_tables=self._tensor(self._pages[slots, : int(self._prompt_blocks[slots].max(initial=0))]),
            context_lens=self._tensor(prompt_lens.astype(np.int32)),
            prefills=tuple(dataclasses.replace(row, context_len=int(prompt_lens[row.row])) for row in view.prefills),
            tasks=self._tasks(counts, prompt_lens, view.num_decodes),
        )
        pooled = tuple(row.pooling for row in rows if row.pooling is not None)
        return PromptsView(encoded, cache_index, seen, pooled)

    def _token_ids(self, rows: Sequence[Row], ends: np.ndarray) -> Tensor:
        """(T,), with the token sampled last where a row names none."""
        token_ids = self._tensor(np.array([token for row in rows for token in row.token_ids or (0,)], dtype=np.int64))
        blank = [(int(end) - 1, row.slot) for row, end in zip(rows, ends, strict=True) if not row.token_ids]
        if blank:
            places, slots = torch.tensor(blank, device=self._device).unbind(1)
            token_ids[places] = self._last_tokens[slots]
        return token_ids

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


class ShardRunner:
    """One rank's part of every step, in the order of the plans."""

    def __init__(
        self, decoder: ShardedDecoder, pages: KVPages, slots: SlotTable, sampler: Sampler | None, mesh: Mesh
    ) -> None:
        self._decoder = decoder
        self._pages = pages
        self._slots = slots
        self._sampler = sampler
        self._mesh = mesh
        self.num_steps = 0
        self.busy_s = 0.0  # within ``run``
        self._spans: Spans | None = None
        self._begin_ns = 0  # since 1970: when the input of a traced plan was there

    def start_trace(self) -> None:
        """Write down what every step does from now on. Thread-safe, as is ``stop_trace``."""
        self.stop_trace()
        spans, mesh = Spans(), self._mesh
        if mesh.tp.size > 1:
            for method in ("all_reduce", "gather", "broadcast"):
                spans.attach(mesh.tp, method, SpanKind.COLLECTIVE, method)
        if mesh.upstream is not None:
            spans.attach(mesh.upstream, "recv", SpanKind.BUBBLE, f"wait for stage {mesh.spec.stage - 1}")
        if mesh.downstream is not None:
            spans.attach(mesh.downstream, "send", SpanKind.HANDOVER, f"to stage {mesh.spec.stage + 1}")
        self._spans = self._decoder.layers.spans = spans

    def stop_trace(self) -> Spans:
        """What was written down; empty if no trace was on."""
        spans = self._spans or Spans()
        self._spans = self._decoder.layers.spans = None
        spans.detach()
        return spans

    def expert_imbalance(self) -> float:
        """See ShardedDecoder."""
        return self._decoder.expert_imbalance()

    def run(self, plan: StepPlan) -> StepResult | None:
        """Run one plan. Returns its tokens on the rank that samples, None on the others. Raises MeshError.

        Of a traced plan the first tensor rank of each stage returns a result that has the stage's time.
        """
        began_s = time.perf_counter()
        try:
            with torch.inference_mode():
                if (spans := self._spans) is None:
                    result = self._run(plan)
                else:
                    begin_ns = time.monotonic_ns()
                    result = self._run(plan)
                    spans.note(SpanKind.STEP, _describe(plan), begin_ns)
                return self._with_time(plan, result) if plan.is_traced else result
        except MeshError as error:
            error.step = plan.step
            raise
        finally:
            self.num_steps += 1
            self.busy_s += time.perf_counter() - began_s

    def _run(self, plan: StepPlan) -> StepResult | None:
        self._slots.start(plan.starts)
        self._slots.grant(plan.grants)
        if self._sampler is not None:
            for start in plan.starts:
                self._sampler.start(start)
        view = self._slots.view(plan)
        mesh = self._mesh
        hidden = mesh.upstream.recv(view.num_tokens) if mesh.upstream is not None else None
        if plan.is_traced:
            self._begin_ns = time.time_ns()
        out = self._decoder(hidden, self._pages, view)
        if mesh.downstream is not None:
            assert out is not None
            mesh.downstream.send(out)
            return None
        if any(row.pooling is not None for row in plan.encoder_rows):
            assert out is not None
            embeddings = tuple(row.tobytes() for row in out.cpu().numpy())
            return StepResult(plan.step, (), embeddings) if self._sampler is not None else None
        return self._sample(plan, out)

    def _with_time(self, plan: StepPlan, result: StepResult | None) -> StepResult | None:
        if self._mesh.spec.tp_rank != 0:
            return result
        stage = StageTime(self._begin_ns, time.time_ns() - self._begin_ns)
        return msgspec.structs.replace(result or StepResult(plan.step, ()), stages=(stage,))

    def _sample(self, plan: StepPlan, logits: Tensor | None) -> StepResult | None:
        sampling = [row for row in plan.rows if row.samples]
        slots = [row.slot for row in sampling]
        result = StepResult(plan.step, ())
        tokens = torch.zeros(len(slots), dtype=torch.int64, device=self._pages.keys.device)
        if self._sampler is not None and logits is not None:
            positions = [row.start + row.num_tokens for row in sampling]
            tokens, sampled = self._sampler.sample(logits, slots, positions)
            result = StepResult(plan.step, tuple(sampled))
        if slots and self._mesh.spec.pp_size == 1:  # with more stages the next plan carries the tokens
            self._slots.set_last_tokens(slots, self._mesh.tp.broadcast(tokens))
        return result if self._sampler is not None else None


def _describe(plan: StepPlan) -> str:
    num_decodes = sum(row.num_tokens == 1 for row in plan.rows)
    prompts = [row.num_tokens for row in plan.rows if row.num_tokens > 1]
    prompts += [len(row.token_ids) for row in plan.encoder_rows]
    parts = [f"{num_decodes} decodes"] if num_decodes else []
    parts += [f"{sum(prompts)} tokens of {len(prompts)} prompts"] if prompts else []
    return f"step {plan.step}: {', '.join(parts)}"
