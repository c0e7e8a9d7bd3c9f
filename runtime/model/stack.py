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

from shardray.parallel.spans import Spans
from shardray.parallel.workspace import Workspace
from shardray.runtime.model.attention import KVPages, PromptsView, StepView
from shardray.runtime.model.blocks import DecoderLayer, Pending
from shardray.runtime.model.kernels import choose_recorder
from shardray.runtime.model.kernels.ops import Angles, NormWeights
from shardray.runtime.model.positions import Rotary
from shardray.runtime.model.rotary_angles import rotary_angles

if TYPE_CHECKING:
    from shardray.parallel.kernels.program import Program


class LayerStack:
    """The layers that one rank has a part of."""

    def __init__(
        self, layers: Sequence[DecoderLayer], max_positions: int, device: torch.device, records: bool = True
    ) -> None:
        """``records``: whether decode steps may be recorded."""
        self._layers = layers
        self._angles = _angle_tables(layers, max_positions, device)
        self._max_positions = max_positions
        self._recorder = choose_recorder(device) if records else None
        self._workspace = Workspace()
        self.spans: Spans | None = None  # while a trace is on
        self._recordings: dict[int, _Recording | None] = {}  # by number of rows; None once such a step has run

    def __call__(self, x: Tensor, pages: KVPages, view: StepView) -> Pending:
        """Hidden states (T, H) to the residual and what is to be added to it. May write into ``x``."""
        angles = {kind: table.at(view.positions) for kind, table in self._angles.items()}
        inputs = _Inputs(x, angles, view)
        if self._recorder is None or view.prefills:
            return self._run(inputs, pages)
        recording = self._recordings.get(view.num_decodes)
        if recording is not None and recording.pages is pages:
            return recording.replay(inputs, self.spans)
        if view.num_decodes in self._recordings:
            return self._record(inputs, pages)
        self._recordings[view.num_decodes] = None
        return self._run(inputs, pages)

    def remember(self, encoded: Tensor, pages: KVPages, prompts: PromptsView) -> None:
        """Show (S, H) of the encoder to every layer, for its cross-attention."""
        for index, layer in enumerate(self._layers):
            layer.remember(encoded, index, pages, prompts)

    def _run(self, inputs: _Inputs, pages: KVPages) -> Pending:
        x, delta = inputs.x, None
        with self._workspace.active():
            for index, layer in enumerate(self._layers):
                self._workspace.new_turn()
                angles = None if layer.rotary is None else inputs.angles[layer.rotary]
                x, delta = layer(x, delta, index, pages, inputs.view, angles)
        return x, delta

    def _record(self, inputs: _Inputs, pages: KVPages) -> Pending:
        assert self._recorder is not None
        own = inputs.with_room_for(-(-self._max_positions // pages.block_size))
        output, program = self._recorder.record(lambda: self._run(own, pages))
        if program is None:
            self._recorder = None
        else:
            self._recordings[inputs.view.num_decodes] = _Recording(own, output, pages, program)
        return output


class EncoderStack:
    """The layers of an encoder that one rank has a part of; ``norm`` if the last one is among them.

    They read whole prompts, so that each needs keys and values only while it runs: all use the same ``pages``, of one
    layer.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], norm: NormWeights | None, max_positions: int, pages: KVPages,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._layers = layers
        self._norm = norm
        self._angles = _angle_tables(layers, max_positions, device)
        self._pages = pages

    def __call__(self, x: Tensor, view: StepView) -> Tensor:
        """(S, H) -> (S, H)"""
        angles = {kind: table.at(view.positions) for kind, table in self._angles.items()}
        delta: Tensor | None = None
        for layer in self._layers:
            x, delta = layer(x, delta, 0, self._pages, view, None if layer.rotary is None else angles[layer.rotary])
        x = x if delta is None else x + delta
        return x if self._norm is None else self._norm(x)


def _angle_tables(layers: Sequence[DecoderLayer], max_positions: int, device: torch.device) -> dict[Rotary, Angles]:
    kinds = dict.fromkeys(layer.rotary for layer in layers if layer.rotary is not None)
    return {kind: rotary_angles(kind, max_positions).to(device) for kind in kinds}


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What changes from step to step."""

    x: Tensor
    angles: dict[Rotary, Angles]
    view: StepView

    def with_room_for(self, max_blocks: int) -> _Inputs:
        """A copy that stays where it is, its block tables as wide as they can get."""
        view = self.view
        tables = view.block_tables.new_zeros(view.num_decodes, max_blocks)
        tables[:, : view.block_tables.shape[1]] = view.block_tables
        angles = {kind: Angles(own.cos.clone(), own.sin.clone(), own.interleaved) for kind, own in self.angles.items()}
        own = dataclasses.replace(
            view, cache_index=view.cache_index.clone(), context_lens=view.context_lens.clone(), block_tables=tables
        )
        return _Inputs(self.x.clone(), angles, own)

    def fill(self, other: _Inputs) -> None:
        self.x.copy_(other.x)
        self.view.cache_index.copy_(other.view.cache_index)
        self.view.context_lens.copy_(other.view.context_lens)
        self.view.block_tables[:, : other.view.block_tables.shape[1]] = other.view.block_tables
        for kind, own in self.angles.items():
            own.cos.copy_(other.angles[kind].cos)
            own.sin.copy_(other.angles[kind].sin)


@dataclasses.dataclass(frozen=True)
class _Recording:
    """A program, where its inputs and outputs lie, and the pages that it reads and writes."""

    inputs: _Inputs
    output: Pending
    pages: KVPages
    program: Program

    def replay(self, inputs: _Inputs, spans: Spans | None) -> Pending:
        self.inputs.fill(inputs)
        if spans is None:
            self.program.run()
        else:
            self.program.run_timed(spans)
        return self.output
