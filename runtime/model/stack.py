"""The layers of one stage: run one by one or, for steps of few tokens on CPUs, as a recorded program.

A decode step of a small model is hundreds of operations of a few microseconds each, and about as much again goes by
between them in Python. So the second step with some number of tokens is recorded, and later ones of that number run as
one call, whatever rows the tokens belong to. Layers in which torch computes something itself always run one by one.

A CUDA graph takes the same place on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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

_MOST_TOKENS = 256  # of a step with prompts: in longer ones the time between operations is nothing
_MOST_RECORDINGS = 256  # a quarter of a megabyte each; the one that was not used for longest gives way


class _Shape(NamedTuple):
    """What a recording is for. Which rows of one token and of several there are is among its inputs."""

    num_tokens: int
    has_decodes: bool
    has_prompts: bool


class LayerStack:
    """The layers that one rank has a part of."""

    def __init__(
        self, layers: Sequence[DecoderLayer], max_positions: int, device: torch.device, records: bool = True
    ) -> None:
        """``records``: whether steps may be recorded."""
        self._layers = layers
        self._angles = _angle_tables(layers, max_positions, device)
        self._max_positions = max_positions
        self._recorder = choose_recorder(device) if records else None
        self._workspace = Workspace()
        self.spans: Spans | None = None  # while a trace is on
        self._recordings: dict[_Shape, _Recording | None] = {}  # None once such a step has run; the last used last
        self._room: dict[int, _Inputs] = {}  # of recordings, by number of tokens; one runs at a time

    def __call__(self, x: Tensor, pages: KVPages, view: StepView) -> Pending:
        """Hidden states (T, H) to the residual and what is to be added to it. May write into ``x``."""
        angles = {kind: table.at(view.positions) for kind, table in self._angles.items()}
        inputs = _Inputs(x, angles, view)
        shape = _Shape(x.shape[0], view.num_decodes > 0, bool(view.prefills))
        if self._recorder is None or (shape.has_prompts and shape.num_tokens > _MOST_TOKENS):
            return self._run(inputs, pages)
        was_seen = shape in self._recordings
        recording = self._recordings.pop(shape, None)
        if recording is not None and recording.pages is pages:
            self._recordings[shape] = recording
            return recording.replay(inputs, self.spans)
        if was_seen:
            return self._record(shape, inputs, pages)
        self._recordings[shape] = None
        if len(self._recordings) > _MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
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

    def _record(self, shape: _Shape, inputs: _Inputs, pages: KVPages) -> Pending:
        assert self._recorder is not None
        size = 1 << (shape.num_tokens - 1).bit_length()
        if size not in self._room:
            self._room[size] = inputs.room(size, -(-self._max_positions // pages.block_size))
        own = inputs.moved_to(self._room[size])
        output, program = self._recorder.record(lambda: self._run(own, pages))
        if program is None:
            self._recorder = None
        else:
            self._recordings[shape] = _Recording(own, output, pages, program)
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

    def moved_to(self, room: _Inputs) -> _Inputs:
        """The same in the memory of ``room``, which has some for more tokens, and for as many rows as tokens."""
        count, there = self.x.shape[0], room.view
        view = dataclasses.replace(
            self.view, cache_index=there.cache_index[:count], context_lens=there.context_lens[:count],
            block_tables=there.block_tables[:count], row_list=there.row_list,
        )  # fmt: skip
        angles = {kind: Angles(own.cos[:count], own.sin[:count], own.interleaved) for kind, own in room.angles.items()}
        moved = _Inputs(room.x[:count], angles, view)
        moved.fill(self)
        return moved

    def room(self, num_tokens: int, max_blocks: int) -> _Inputs:
        """Memory like theirs, block tables as wide as can be."""
        view = self.view
        assert view.row_list is not None
        own = dataclasses.replace(
            view,
            cache_index=view.cache_index.new_zeros(num_tokens),
            context_lens=view.context_lens.new_zeros(num_tokens),
            block_tables=view.block_tables.new_zeros(num_tokens, max_blocks),
            row_list=view.row_list.new_zeros(1 + num_tokens // 2, view.row_list.shape[1]),
        )
        angles = {
            kind: Angles(
                own.cos.new_zeros(num_tokens, own.cos.shape[1]), own.sin.new_zeros(num_tokens, own.sin.shape[1]),
                own.interleaved,
            )
            for kind, own in self.angles.items()
        }  # fmt: skip
        return _Inputs(self.x.new_zeros(num_tokens, self.x.shape[1]), angles, own)

    def fill(self, other: _Inputs) -> None:
        own, view = self.view, other.view
        assert own.row_list is not None
        assert view.row_list is not None
        num_rows, num_blocks = view.block_tables.shape
        self.x.copy_(other.x)
        own.cache_index.copy_(view.cache_index)
        own.context_lens[:num_rows] = view.context_lens
        own.block_tables[:num_rows, :num_blocks] = view.block_tables
        own.row_list[: view.row_list.shape[0]] = view.row_list
        for kind, table in self.angles.items():
            table.cos.copy_(other.angles[kind].cos)
            table.sin.copy_(other.angles[kind].sin)


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
