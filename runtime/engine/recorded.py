"""Decode steps that run as one recording each: embedding, layers, head, the best token, and what the slot sampled last.

There is one for each of a few numbers of rows; a step runs in the next larger one, filled up with rows that nobody
reads. All ranks of a mesh record the same ones, in the same order, while it forms.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shardray.parallel.errors import MeshError
from shardray.parallel.mesh import Mesh
from shardray.parallel.spans import Spans
from shardray.runtime.engine.inputs import Array, DecodeShape, StaticInputs, StepInputs, decode_sizes
from shardray.runtime.engine.recorder import Recorder, choose_recorder, find_obstacle
from shardray.runtime.engine.slots import LaidOut, SlotTable
from shardray.runtime.engine.step import StepPlan
from shardray.runtime.model.attention import StepView

_log = logging.getLogger(__name__)


class StepOutput(NamedTuple):
    """What a step leaves on the device. S sampling rows."""

    out: Tensor | None  # hidden states for the next stage, this rank's logits (S, v), or embeddings
    tokens: Tensor | None = None  # (S,) int64, where the highest logit is all that matters

    def first(self, num_rows: int) -> StepOutput:
        return StepOutput(*(None if part is None else part[:num_rows] for part in self))


Compute = Callable[[Tensor | None, StepView, Tensor, bool], StepOutput]  # ShardRunner.compute


class RecordedStep:
    """Of one number of rows."""

    def __init__(self, inputs: StaticInputs, hidden: Tensor | None, replay: Callable[[], StepOutput]) -> None:
        self._inputs = inputs
        self._hidden = hidden
        self._replay = replay

    def has_room_for(self, arrays: StepInputs[Array]) -> bool:
        """Of a step of that many rows or fewer: see StaticInputs."""
        return self._inputs.has_room_for(arrays)

    def replay(self, arrays: StepInputs[Array], hidden: Tensor | None) -> tuple[StepOutput, Tensor]:
        """Run a step that there is room for: see RecordedSteps."""
        num_rows = len(arrays.slots)
        self._inputs.fill(arrays)
        if self._hidden is not None:
            assert hidden is not None
            self._hidden[:num_rows].copy_(hidden)
        return self._replay().first(num_rows), self._inputs.tensors.sampling_slots[:num_rows]


class RecordedSteps:
    """All that one rank has recorded."""

    spans: Spans | None = None  # a graph does not tell

    def __init__(self, steps: dict[int, RecordedStep]) -> None:
        self._steps = steps
        self.sizes = sorted(steps)

    def run(
        self, plan: StepPlan, lay_out: Callable[[], LaidOut], hidden: Tensor | None
    ) -> tuple[StepOutput, Tensor] | None:
        """What a step leaves, and the slots whose tokens those are; None if it is to run operation by operation.

        ``hidden``: of the stage before. The output is good until the next step.
        """
        laid_out = lay_out()
        if not laid_out.is_decode:
            return None
        step = self._steps[self.sizes[bisect_left(self.sizes, len(laid_out.inputs.slots))]]
        return step.replay(laid_out.inputs, hidden) if step.has_room_for(laid_out.inputs) else None


class StepRecording:
    """Records the decode steps of one rank. ``scratch_page``: one that no sequence has."""

    def __init__(
        self, compute: Compute, slots: SlotTable, mesh: Mesh, scratch_page: int, block_size: int,
        hidden_like: Tensor,
    ) -> None:  # fmt: skip
        """``hidden_like``: of the size and dtype of a token's hidden state, (H,)."""
        self._compute = compute
        self._slots = slots
        self._mesh = mesh
        self._scratch_page = scratch_page
        self._block_size = block_size
        self._hidden: Tensor | None = None
        if mesh.upstream is not None:
            self._hidden = hidden_like.new_zeros(slots.scratch_slot, *hidden_like.shape)

    @torch.inference_mode()
    def record(self) -> RecordedSteps | None:
        """None if a graph cannot hold such steps, on this rank or another. Every rank of the mesh calls this."""
        begin_s, sizes = time.monotonic(), decode_sizes(self._slots.scratch_slot)
        obstacle = find_obstacle(self._step(sizes[-1])[1])
        if obstacle is not None:
            _log.info("decode steps run operation by operation: a recording cannot hold %s", obstacle)
        if not self._mesh.agree_on_minimum("decode steps can be recorded", int(obstacle is None)):
            return None
        recorder, steps = choose_recorder(self._mesh.spec.device), {}
        for num_rows in reversed(sizes):
            step = self._record_one(recorder, num_rows)
            # Each by itself: ranks that went on alone would wait on the device for the one that could not.
            if not self._mesh.agree_on_minimum(f"decode steps of {num_rows} rows are recorded", int(step is not None)):
                return None
            assert step is not None
            steps[num_rows] = step
        _log.info("recorded decode steps of up to %d rows in %.1f s", sizes[-1], time.monotonic() - begin_s)
        return RecordedSteps(steps)

    def _record_one(self, recorder: Recorder, num_rows: int) -> RecordedStep | None:
        try:
            inputs, run = self._step(num_rows)
            hidden = None if self._hidden is None else self._hidden[:num_rows]
            return RecordedStep(inputs, hidden, recorder.record(run))
        except MeshError:
            raise
        except RuntimeError as error:
            _log.warning("decode steps could not be recorded, and run slower: %s", str(error).splitlines()[0])
            return None

    def _step(self, num_rows: int) -> tuple[StaticInputs, Callable[[], StepOutput]]:
        """The inputs of a step, and the step."""
        slots, spec = self._slots, self._mesh.spec
        shape = DecodeShape(
            num_rows, slots.max_blocks, self._block_size, self._scratch_page, slots.scratch_slot, slots.has_tasks
        )
        inputs = StaticInputs(shape, spec.device, max(2, spec.pp_size) + 1)
        hidden, tensors = None if self._hidden is None else self._hidden[:num_rows], inputs.tensors
        return inputs, lambda: self._compute(hidden, slots.as_view(tensors), tensors.sampling_slots, True)
