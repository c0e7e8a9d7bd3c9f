"""What a rank keeps of the requests in its slots: the pages of each, and the token that it sampled last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.parallel.rows import fill_in, put_words
from shardray.runtime.engine.inputs import LAST_TOKEN, Array, StepInputs, to_device, upload
from shardray.runtime.engine.step import EncoderRow, PageGrant, Row, SlotStart, StepPlan
from shardray.runtime.model.attention import AttentionRow, AttentionTasks, PromptsView, StepView, list_rows
from shardray.runtime.model.kernels.splits import decode_splits, prefill_tiles


class LaidOut(NamedTuple):
    """A plan as arrays of the host."""

    inputs: StepInputs[Array]
    prefills: tuple[AttentionRow, ...]  # rows of several tokens
    encoder_rows: tuple[EncoderRow, ...]

    @property
    def num_decodes(self) -> int:
        """Rows of one token."""
        return len(self.inputs.slots) - len(self.prefills)

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token, and samples the next one."""
        return not (self.prefills or self.encoder_rows) and len(self.inputs.sampling_slots) == len(self.inputs.slots)


class SlotTable:
    """What the deltas of the plans add up to, and a plan laid out by it.

    ``max_prompt_len``: with an encoder, of the prompts that it reads; their pages are a slot's first ones.
    Legend: T tokens of the step, R rows, S sampling rows.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device,
        max_prompt_len: int | None = None,
    ) -> None:  # fmt: skip
        self._block_size = block_size
        self._device = device
        self.has_prompts = max_prompt_len is not None
        self.has_tasks = runs_triton(device)
        self.scratch_slot = max_num_seqs  # of rows that only fill up a step
        self.max_blocks = -(-max_model_len // block_size)  # of what a slot has itself
        num_blocks = self.max_blocks - (-(max_prompt_len or 0) // block_size)
        self._pages = np.zeros((max_num_seqs, num_blocks), dtype=np.int32)
        self._prompt_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)

    def grant(self, grants: Sequence[PageGrant]) -> None:
        for grant in grants:
            self._pages[grant.slot, grant.first_block : grant.first_block + len(grant.pages)] = grant.pages

    def start(self, starts: Sequence[SlotStart]) -> None:
        for start in starts:
            self._prompt_blocks[start.slot] = -(-start.prompt_len // self._block_size)
            self._prompt_lens[start.slot] = start.prompt_len

    def set_last_tokens(self, slots: Tensor, tokens: Tensor) -> None:
        put_words(self._last_tokens, slots, tokens)

    def lay_out(self, plan: StepPlan) -> LaidOut:
        """A plan as arrays of the host; rows of one token first, otherwise in the plan's order."""
        is_decode = all(row.num_tokens == 1 and row.samples for row in plan.rows)
        if is_decode and plan.rows and not self.has_prompts:
            return LaidOut(self._lay_out_decodes(plan.rows), (), ())
        return self._lay_out_rows(plan)

    def _lay_out_decodes(self, rows: Sequence[Row]) -> StepInputs[Array]:
        """What ``_lay_out_rows`` makes of rows of one token that sample, in a quarter of the time.

        Between two steps nothing of numpy is in a core's caches, and each of its calls takes ten times as long.
        """
        size, pages = self._block_size, self._pages.item
        whole = np.array(
            (
                [row.token_ids[0] if row.token_ids else LAST_TOKEN for row in rows],
                [row.start for row in rows],
                [pages(row.slot, row.start // size) * size + row.start % size for row in rows],
                [row.slot for row in rows],
                range(len(rows)),
            ),
            dtype=np.int64,
        )
        token_ids, positions, cache_index, slots, sampled = whole
        lens = np.array([row.start + 1 for row in rows], dtype=np.int32)
        tables = np.ascontiguousarray(self._pages[slots, : max(row.start for row in rows) // size + 1])
        inputs = StepInputs(token_ids, positions, cache_index, slots, lens, sampled, slots, tables)
        return self._with_tasks(inputs, np.ones_like(slots), len(rows)) if self.has_tasks else inputs

    def lay_out_decodes(self, rows: Tensor, out: StepInputs[Tensor]) -> None:
        """The same in compiled code, on CPUs: rows (R, 3) of slot, start and token, written into ``out``."""
        from shardray.runtime.model.kernels.cpu_steps import compile_lay_out

        compile_lay_out()(
            1, len(rows), self._block_size, self._pages.shape[1], self._pages.ctypes.data, rows.data_ptr(),
            out.token_ids.data_ptr(), out.positions.data_ptr(), out.cache_index.data_ptr(), out.slots.data_ptr(),
            out.context_lens.data_ptr(), out.sampled_tokens.data_ptr(), out.sampling_slots.data_ptr(),
            out.block_tables.shape[1], out.block_tables.data_ptr(),
        )  # fmt: skip

    def _lay_out_rows(self, plan: StepPlan) -> LaidOut:
        rows = sorted(plan.rows, key=lambda row: row.num_tokens > 1)
        counts = np.array([row.num_tokens for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        token_ids = np.array([token for row in rows for token in row.token_ids or (LAST_TOKEN,)], dtype=np.int64)
        num_decodes = int((counts == 1).sum())
        tables = self._tables(slots, starts + counts)
        inputs = self._lay_out(token_ids, counts, starts, slots, tables, num_decodes)
        begins = dict(zip(slots.tolist(), (np.cumsum(counts) - counts - starts).tolist(), strict=True))
        places = plan.sampled
        # A slot with drafted tokens comes several times. What it sampled last is not read: its next row brings it.
        sampling = np.array([slot for slot, _ in places], dtype=np.int64)
        sampled = np.array([begins[slot] + position - 1 for slot, position in places], dtype=np.int64)
        inputs = inputs._replace(sampled_tokens=sampled, sampling_slots=sampling)
        return LaidOut(inputs, _prefills(counts, starts, num_decodes), plan.encoder_rows)

    def as_view(
        self, inputs: StepInputs[Tensor], laid_out: LaidOut | None = None, row_list: Tensor | None = None
    ) -> StepView:
        """What the decoder reads of inputs that are on the device: those of a plan, or of rows of one token each.

        ``row_list``: where that lies already.
        """
        if laid_out is None:
            return self._as_view(inputs, len(inputs.slots), (), row_list)
        view = self._as_view(inputs, laid_out.num_decodes, laid_out.prefills, row_list)
        return dataclasses.replace(view, prompts=self._prompts(laid_out, view)) if self.has_prompts else view

    def _as_view(
        self, inputs: StepInputs[Tensor], num_decodes: int, prefills: tuple[AttentionRow, ...],
        row_list: Tensor | None = None,
    ) -> StepView:  # fmt: skip
        if row_list is None and not self.has_tasks:
            row_list = list_rows(num_decodes, prefills)
        return StepView(
            token_ids=fill_in(inputs.token_ids, LAST_TOKEN, self._last_tokens, inputs.slots),
            positions=inputs.positions,
            cache_index=inputs.cache_index,
            num_decodes=num_decodes,
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            prefills=prefills,
            sampled_tokens=inputs.sampled_tokens,
            tasks=_tasks(inputs),
            row_list=row_list,
        )

    def _tables(self, slots: Array, lens: Array) -> Array:
        """(R, blocks): the pages of what each row has itself."""
        num_blocks = -(-int(lens.max(initial=0)) // self._block_size)
        tables: Array = self._pages[slots, :num_blocks]
        if self.has_prompts:
            last = self._pages.shape[1] - 1
            blocks = np.minimum(self._prompt_blocks[slots, None] + np.arange(num_blocks), last)
            tables = self._pages[slots[:, None], blocks]
        return tables

    def _lay_out(
        self, token_ids: Array, counts: Array, starts: Array, slots: Array, tables: Array, num_decodes: int
    ) -> StepInputs[Array]:
        """Rows of ``counts`` tokens from ``starts`` on, none of which samples; the first ``num_decodes`` of one."""
        ends = np.cumsum(counts)  # of each row's tokens, in the step
        positions = np.arange(len(token_ids)) - np.repeat(ends - counts - starts, counts)
        pages = tables[np.repeat(np.arange(len(counts)), counts), positions // self._block_size]
        inputs = StepInputs(
            token_ids=token_ids,
            positions=positions,
            cache_index=pages.astype(np.int64) * self._block_size + positions % self._block_size,
            slots=slots,
            context_lens=(starts + counts).astype(np.int32),
            sampled_tokens=slots[:0],
            sampling_slots=slots[:0],
            block_tables=np.ascontiguousarray(tables),
        )
        return self._with_tasks(inputs, counts, num_decodes) if self.has_tasks else inputs

    def _with_tasks(self, inputs: StepInputs[Array], counts: Array, num_decodes: int) -> StepInputs[Array]:
        splits, split_starts = decode_splits(inputs.context_lens[:num_decodes])
        return inputs._replace(
            splits=splits,
            split_starts=split_starts,
            tiles=prefill_tiles(counts, num_decodes),
            query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        )

    def _prompts(self, laid_out: LaidOut, view: StepView) -> PromptsView:
        rows, slots = laid_out.encoder_rows, laid_out.inputs.slots
        encoded, cache_index = None, view.cache_index[:0]
        if rows:
            places = np.array([row.slot for row in rows], dtype=np.int64)
            lens = self._prompt_lens[places] = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
            token_ids = np.array([token for row in rows for token in row.token_ids], dtype=np.int64)
            blocks, begin = (lens + self._block_size - 1) // self._block_size, np.zeros_like(lens)
            of_encoder = (np.cumsum(blocks) - blocks)[:, None] + np.arange(int(blocks.max()))
            own = self._pages[places, : int(blocks.max())]
            inputs = self._lay_out(token_ids, lens, begin, places, of_encoder.astype(np.int32), 0)
            encoded = self._as_view(upload(inputs, self._device), 0, _prefills(lens, begin, 0))
            inputs = self._lay_out(token_ids, lens, begin, places, own, 0)
            cache_index = to_device(inputs.cache_index, self._device)
        prompt_lens = self._prompt_lens[slots]
        tables = self._pages[slots, : int(self._prompt_blocks[slots].max(initial=0))]
        prefills = tuple(dataclasses.replace(row, context_len=int(prompt_lens[row.row])) for row in view.prefills)
        seen = dataclasses.replace(
            view,
            block_tables=to_device(tables, self._device),
            context_lens=to_device(prompt_lens.astype(np.int32), self._device),
            prefills=prefills,
            tasks=self._prompt_tasks(view, prompt_lens),
            row_list=None if self.has_tasks else list_rows(view.num_decodes, prefills),
        )
        pooled = tuple(row.pooling for row in rows if row.pooling is not None)
        return PromptsView(encoded, cache_index, seen, pooled)

    def _prompt_tasks(self, view: StepView, prompt_lens: Array) -> AttentionTasks | None:
        """Of the rows of a step, each over the whole of its prompt."""
        if view.tasks is None:
            return None
        splits, starts = (to_device(part, self._device) for part in decode_splits(prompt_lens[: view.num_decodes]))
        return dataclasses.replace(view.tasks, splits=splits, split_starts=starts)


def _tasks(inputs: StepInputs[Tensor]) -> AttentionTasks | None:
    if inputs.splits is None:
        return None
    assert inputs.split_starts is not None
    assert inputs.tiles is not None
    assert inputs.query_starts is not None
    return AttentionTasks(inputs.splits, inputs.split_starts, inputs.tiles, inputs.query_starts)


def _prefills(counts: Array, starts: Array, num_decodes: int) -> tuple[AttentionRow, ...]:
    """Rows from ``num_decodes`` on, as those of several tokens."""
    ends = np.cumsum(counts)
    return tuple(
        AttentionRow(i, int(ends[i] - counts[i]), int(counts[i]), int(starts[i] + counts[i]))
        for i in range(num_decodes, len(counts))
    )
