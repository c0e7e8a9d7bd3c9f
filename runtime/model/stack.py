"""The layers of one stage: run one by one or, for decode steps on CPUs, as a recorded program.

A decode step of a small model is hundreds of operations of a few microseconds each, and about as much again goes by
between them in Python. So the second step with some number of rows is recorded, and later ones of that number run as
one call. Layers in which torch computes something itself always run one by one.

A CUDA graph takes the same place on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardray.runtime.model.attention import KVPages, StepView
from shardray.runtime.model.blocks import DecoderLayer
from shardray.runtime.model.kernels import choose_recorder
from shardray.runtime.model.kernels.ops import Angles

if TYPE_CHECKING:
    from shardray.parallel.kernels.program import Program

Output = tuple[Tensor, Tensor]  # the residual (T, H) and what is to be added to it


class LayerStack:
    """The layers that one rank has a part of."""

    def __init__(
        self, layers: Sequence[DecoderLayer], angles: Angles | None, max_positions: int, device: torch.device
    ) -> None:
        """``angles`` are those of all positions."""
        self._layers = layers
        self._angles = angles
        self._max_positions = max_positions
        self._recorder = choose_recorder(device)
        self._recordings: dict[int, _Recording | None] = {}  # by number of rows; None once such a step has run

    def __call__(self, x: Tensor, pages: KVPages, view: StepView) -> Output:
        """Hidden states (T, H) to the residual and what is to be added to it. May write into ``x``."""
        inputs = _Inputs(x, self._select_angles(view.positions), view)
        if self._recorder is None or view.prefills:
            return self._run(inputs, pages)
        recording = self._recordings.get(view.num_decodes)
        if recording is not None and recording.pages is pages:
            return recording.replay(inputs)
        if view.num_decodes in self._recordings:
            return self._record(inputs, pages)
        self._recordings[view.num_decodes] = None
        return self._run(inputs, pages)

    def _run(self, inputs: _Inputs, pages: KVPages) -> Output:
        x, delta = inputs.x, None
        for index, layer in enumerate(self._layers):
            if self._recorder is not None:
                self._recorder.new_turn()
            x, delta = layer(x, delta, index, pages, inputs.view, inputs.angles)
        assert delta is not None
        return x, delta

    def _record(self, inputs: _Inputs, pages: KVPages) -> Output:
        assert self._recorder is not None
        own = inputs.with_room_for(-(-self._max_positions // pages.block_size))
        output, program = self._recorder.record(lambda: self._run(own, pages))
        if program is None:
            self._recorder = None
        else:
            self._recordings[inputs.view.num_decodes] = _Recording(own, output, pages, program)
        return output

    def _select_angles(self, positions: Tensor) -> Angles | None:
        if self._angles is None:
            return None
        cos, sin = self._angles
        return cos[positions], sin[positions]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What changes from step to step."""

    x: Tensor
    angles: Angles | None
    view: StepView

    def with_room_for(self, max_blocks: int) -> _Inputs:
        """A copy that stays where it is, its block tables as wide as they can get."""
        view = self.view
        tables = view.block_tables.new_zeros(view.num_decodes, max_blocks)
        tables[:, : view.block_tables.shape[1]] = view.block_tables
        angles = None if self.angles is None else (self.angles[0].clone(), self.angles[1].clone())
        own = dataclasses.replace(
            view, cache_index=view.cache_index.clone(), context_lens=view.context_lens.clone(), block_tables=tables
        )
        return _Inputs(self.x.clone(), angles, own)

    def fill(self, other: _Inputs) -> None:
        self.x.copy_(other.x)
        self.view.cache_index.copy_(other.view.cache_index)
        self.view.context_lens.copy_(other.view.context_lens)
        self.view.block_tables[:, : other.view.block_tables.shape[1]] = other.view.block_tables
        for own, given in zip(self.angles or (), other.angles or (), strict=True):
            own.copy_(given)


@dataclasses.dataclass(frozen=True)
class _Recording:
    """A program, where its inputs and outputs lie, and the pages that it reads and writes."""

    inputs: _Inputs
    output: Output
    pages: KVPages
    program: Program

    def replay(self, inputs: _Inputs) -> Output:
        self.inputs.fill(inputs)
        self.program.run()
        return self.output
