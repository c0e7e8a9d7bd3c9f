"""Steps on CPUs that run as one recorded program each: embedding, layers, head, best tokens.

A decode step of a small model is hundreds of operations of a few microseconds each, and about as much again goes by
between them in Python. So the second step of a kind is recorded, and later ones of that kind run as one call, whatever
rows their tokens belong to. A model in which torch computes something itself always runs operation by operation.

A CUDA graph takes the same place on a GPU (see recorded.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shardray.parallel.spans import Spans
from shardray.runtime.engine.inputs import LAST_TOKEN, StepInputs
from shardray.runtime.engine.recorded import Compute, StepOutput
from shardray.runtime.engine.slots import LaidOut, SlotTable
from shardray.runtime.engine.step import Row, StepPlan
from shardray.runtime.model.attention import list_rows

if TYPE_CHECKING:
    from shardray.parallel.kernels.program import Program, Recorder

_MOST_TOKENS = 256  # of a step with prompts: in longer ones the time between operations is nothing
_SAMPLED_UNIT = 16  # rows: other numbers are filled up, so that few kinds of steps with prompts are recorded
_MOST_PROGRAMS = 256  # a quarter of a megabyte each; the one that was not used for longest gives way


def prepare_programs() -> None:
    """Make ready what programs need besides the operations of a model. Needs numba."""
    from shardray.runtime.model.kernels.cpu_steps import compile_lay_out

    compile_lay_out()


class _Kind(NamedTuple):
    """What a program is for. Which rows of one token and of several there are is among its inputs."""

    num_tokens: int
    num_sampled: int
    has_decodes: bool
    has_prompts: bool
    is_greedy: bool
    is_decode: bool  # every row has one token, and samples the next one


class _Room:
    """Where the inputs of steps of up to ``size`` tokens lie; one runs at a time."""

    def __init__(self, size: int, max_blocks: int, hidden_like: Tensor | None) -> None:
        words = torch.zeros(6, size, dtype=torch.int64)
        token_ids, positions, cache_index, slots, sampled, sampling_slots = words
        lens = torch.zeros(size, dtype=torch.int32)
        tables = torch.zeros(size, max_blocks, dtype=torch.int32)
        self._tensors = StepInputs(token_ids, positions, cache_index, slots, lens, sampled, sampling_slots, tables)
        self._arrays = [tensor.numpy() for tensor in self._tensors if tensor is not None]
        self.decodes = torch.zeros(size, 3, dtype=torch.int64)  # slot, start and token of rows, for ``lay_out_decodes``
        self._decodes = self.decodes.numpy()
        self.row_list = torch.zeros(1 + size // 2, list_rows(0, ()).shape[1], dtype=torch.int64)
        self._counts = self.row_list[0].numpy()
        self.hidden = None if hidden_like is None else hidden_like.new_zeros(size, *hidden_like.shape)

    def tensors(self, kind: _Kind) -> StepInputs[Tensor]:
        """Those of a step of that kind. There is room for as many rows as tokens."""
        sizes = dict.fromkeys(("sampled_tokens", "sampling_slots"), kind.num_sampled)
        parts = zip(StepInputs._fields, self._tensors, strict=True)
        return StepInputs(
            **{name: part[: sizes.get(name, kind.num_tokens)] for name, part in parts if part is not None}
        )

    def fill_decodes(self, rows: Sequence[Row]) -> None:
        """Of these the program does the rest: between two steps nothing of numpy is in a core's caches."""
        self._decodes[: len(rows)] = [
            (row.slot, row.start, row.token_ids[0] if row.token_ids else LAST_TOKEN) for row in rows
        ]
        self._counts[0], self._counts[1] = len(rows), 0

    def fill(self, laid_out: LaidOut, num_sampled: int, scratch_slot: int) -> None:
        """``num_sampled``: those that fill up included."""
        for target, array in zip(self._arrays, laid_out.inputs, strict=False):
            assert array is not None
            target[tuple(map(slice, array.shape))] = array
        filling = slice(len(laid_out.inputs.sampled_tokens), num_sampled)
        self._tensors.sampled_tokens[filling] = 0
        self._tensors.sampling_slots[filling] = scratch_slot
        row_list = list_rows(laid_out.num_decodes, laid_out.prefills)
        self.row_list[: len(row_list)] = row_list

    def fill_hidden(self, hidden: Tensor | None) -> None:
        if self.hidden is not None:
            assert hidden is not None
            self.hidden[: len(hidden)].copy_(hidden)


class _Recorded(NamedTuple):
    room: _Room
    inputs: StepInputs[Tensor]
    output: StepOutput
    program: Program


class StepPrograms:
    """All that one rank has recorded, and what records more."""

    sizes: tuple[int, ...] = ()  # of steps that are recorded ahead: none

    def __init__(
        self, recorder: Recorder, compute: Compute, slots: SlotTable, hidden_like: Tensor | None, samples: bool
    ) -> None:
        """``hidden_like``: of the size and dtype of a token's hidden state, (H,), if they come from another stage.
        ``samples``: whether this is the last stage.
        """
        prepare_programs()
        self._recorder: Recorder | None = recorder
        self._compute = compute
        self._slots = slots
        self._hidden_like = hidden_like
        self._samples = samples
        self._seen: set[_Kind] = set()  # that one step has been of, at least: the next one is recorded
        self._programs: OrderedDict[_Kind, _Recorded] = OrderedDict()  # the last used last
        self._rooms: dict[int, _Room] = {}
        self.spans: Spans | None = None

    def run(
        self, plan: StepPlan, lay_out: Callable[[], LaidOut], hidden: Tensor | None
    ) -> tuple[StepOutput, Tensor] | None:
        """What a step leaves, and the slots whose tokens those are; None if it is to run operation by operation.

        ``hidden``: of the stage before. The output is good until the next step.
        """
        if self._recorder is None:
            return None
        kind = self._kind_of(plan, lay_out)
        if kind.has_prompts and kind.num_tokens > _MOST_TOKENS:
            return None
        if kind not in self._seen:
            self._seen.add(kind)
            return None
        if (recorded := self._programs.get(kind)) is None:
            output, slots = self._record(kind, plan, lay_out, hidden)
        else:
            self._programs.move_to_end(kind)
            self._fill(recorded.room, kind, plan, lay_out, hidden)
            if self.spans is None:
                recorded.program.run()
            else:
                recorded.program.run_timed(self.spans)
            output, slots = recorded.output, recorded.inputs.sampling_slots
        if kind.is_decode or not self._samples:
            return output, slots
        num_sampled = len(lay_out().inputs.sampled_tokens)
        return output.first(num_sampled), slots[:num_sampled]

    def _fill(
        self, room: _Room, kind: _Kind, plan: StepPlan, lay_out: Callable[[], LaidOut], hidden: Tensor | None
    ) -> None:
        room.fill_hidden(hidden)
        if kind.is_decode:
            room.fill_decodes(plan.rows)
        else:
            room.fill(lay_out(), kind.num_sampled, self._slots.scratch_slot)

    def _record(
        self, kind: _Kind, plan: StepPlan, lay_out: Callable[[], LaidOut], hidden: Tensor | None
    ) -> tuple[StepOutput, Tensor]:
        """Run a step and keep how, unless torch computed something in it: then it will in all others."""
        assert self._recorder is not None
        size = 1 << (kind.num_tokens - 1).bit_length()
        if size not in self._rooms:
            self._rooms[size] = _Room(size, self._slots.max_blocks, self._hidden_like)
        room = self._rooms[size]
        self._fill(room, kind, plan, lay_out, hidden)
        inputs, own = room.tensors(kind), None if room.hidden is None else room.hidden[: kind.num_tokens]

        def run() -> StepOutput:
            if kind.is_decode:
                self._slots.lay_out_decodes(room.decodes[: kind.num_tokens], inputs)
            view = self._slots.as_view(inputs, None if kind.is_decode else lay_out(), room.row_list)
            return self._compute(own, view, inputs.sampling_slots, kind.is_greedy)

        output, program = self._recorder.record(run)
        if program is None:
            self._recorder = None
        else:
            self._keep(kind, _Recorded(room, inputs, output, program))
        return output, inputs.sampling_slots

    def _keep(self, kind: _Kind, recorded: _Recorded) -> None:
        self._programs[kind] = recorded
        if len(self._programs) > _MOST_PROGRAMS:
            given_up, _ = self._programs.popitem(last=False)
            self._seen.remove(given_up)

    def _kind_of(self, plan: StepPlan, lay_out: Callable[[], LaidOut]) -> _Kind:
        if plan.rows and all(row.samples and row.num_tokens == 1 for row in plan.rows):
            return _Kind(len(plan.rows), len(plan.rows), True, False, plan.is_greedy, True)
        laid_out = lay_out()
        num_tokens, num_sampled = len(laid_out.inputs.token_ids), 0
        if self._samples:
            units = -(-len(laid_out.inputs.sampled_tokens) // _SAMPLED_UNIT)
            num_sampled = min(units * _SAMPLED_UNIT, num_tokens)
        return _Kind(num_tokens, num_sampled, laid_out.num_decodes > 0, bool(laid_out.prefills), plan.is_greedy, False)
