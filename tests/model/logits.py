"""The logits of every token of chosen rows, through the runner's own slot table, pages and decoder on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.inputs import upload
from shardray.runtime.engine.programs import StepPrograms
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.engine.shard import form_shard
from shardray.runtime.engine.step import EncoderRow, PageGrant, Row, SlotStart, StepPlan

MAX_MODEL_LEN, BLOCK_SIZE, NUM_SLOTS = 128, 16, 4


class LogitsOf:
    """A model folder on one rank. Slots keep what they have seen, as in the engine."""

    def __init__(self, folder: Path, dtype: str = "float32", share_weights: bool = False) -> None:
        self._shard = form_shard(
            ShardAssignment(
                epoch="logits",
                secret="",
                rank=0,
                tp_size=1,
                pp_size=1,
                nodes=("here",),
                store_host="",
                store_port=0,
                bind_host="127.0.0.1",
                device="cpu",
                model_dir=str(folder),
                dtype=dtype,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=NUM_SLOTS,
                max_num_batched_tokens=256,
                block_size=BLOCK_SIZE,
                kv_memory_bytes=64 << 20,
                share_weights=share_weights,
            )
        )
        encoder = self._shard.engine.info.encoder
        room = MAX_MODEL_LEN + (0 if encoder is None else encoder.max_prompt_len)
        self._num_blocks = -(-room // BLOCK_SIZE)
        self._seen = [0] * NUM_SLOTS
        self._granted = False

    @property
    def programs(self) -> StepPrograms | None:
        """What steps are recorded in, if anything."""
        recorded = self._shard._runner._recorded
        assert recorded is None or isinstance(recorded, StepPrograms)
        return recorded

    def record_nothing(self) -> None:
        self._shard._runner.use_recorded(None)

    @property
    def num_borrowed_bytes(self) -> int:
        """Of weights that were loaded elsewhere."""
        return self._shard._num_borrowed_bytes

    def step(
        self, rows: dict[int, Sequence[int]], prompts: dict[int, Sequence[int]] | None = None
    ) -> dict[int, Tensor]:
        """Feed the next tokens of some slots; gives (num_tokens, vocab_size) float32 for each.

        ``prompts``: what an encoder reads in the same step, for any slots.
        """
        prompts = prompts or {}
        plan = StepPlan(
            step=0,
            starts=tuple(SlotStart(slot, SamplingParams(), (), (), 0, len(ids)) for slot, ids in prompts.items()),
            grants=() if self._granted else self._scattered_pages(),
            rows=tuple(Row(slot, self._seen[slot], tuple(ids), True) for slot, ids in rows.items()),
            encoder_rows=tuple(EncoderRow(slot, tuple(ids), None) for slot, ids in prompts.items()),
            is_greedy=False,
        )
        self._granted = True
        runner = self._shard._runner
        with torch.inference_mode():
            runner._slots.start(plan.starts)
            runner._slots.grant(plan.grants)
            laid_out, every = runner._slots.lay_out(plan), np.arange(sum(map(len, rows.values())))
            inputs = laid_out.inputs._replace(sampled_tokens=every, sampling_slots=np.full_like(every, NUM_SLOTS))
            laid_out = laid_out._replace(inputs=inputs)
            done = None if self.programs is None else self.programs.run(plan, lambda: laid_out, None)
            if done is not None:
                logits = done[0].out
            else:
                view = runner._slots.as_view(upload(inputs, torch.device("cpu")), laid_out)
                logits = runner._decoder(None, runner._pages, view)
        if not rows:
            return {}
        assert logits is not None
        decodes_first = sorted(rows, key=lambda slot: len(rows[slot]) > 1)
        parts = logits.split([len(rows[slot]) for slot in decodes_first])
        for slot, ids in rows.items():
            self._seen[slot] += len(ids)
        return dict(zip(decodes_first, (part.clone() for part in parts), strict=True))

    def __enter__(self) -> LogitsOf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shard.close()

    def _scattered_pages(self) -> tuple[PageGrant, ...]:
        """Pages of the slots interleaved and out of order."""
        blocks = range(self._num_blocks)
        return tuple(
            PageGrant(slot, 0, tuple((len(blocks) - 1 - block) * NUM_SLOTS + slot for block in blocks))
            for slot in range(NUM_SLOTS)
        )
