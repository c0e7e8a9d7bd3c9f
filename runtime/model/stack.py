"""The layers of one stage, and those of an encoder, run one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardray.parallel.workspace import Workspace
from shardray.runtime.model.attention import KVPages, PromptsView, StepView
from shardray.runtime.model.blocks import DecoderLayer, Pending
from shardray.runtime.model.kernels.ops import Angles, NormWeights
from shardray.runtime.model.positions import Rotary
from shardray.runtime.model.rotary_angles import rotary_angles


class LayerStack:
    """The layers that one rank has a part of."""

    def __init__(self, layers: Sequence[DecoderLayer], max_positions: int, device: torch.device) -> None:
        self._layers = layers
        self._tables = _angle_tables(layers, max_positions, device)
        self._workspace = Workspace()

    def angles(self, positions: Tensor) -> dict[Rotary, Angles]:
        """What the layers read of the positions (T,) of a step's tokens."""
        return {kind: table.at(positions) for kind, table in self._tables.items()}

    def __call__(self, x: Tensor, pages: KVPages, view: StepView, angles: Mapping[Rotary, Angles]) -> Pending:
        """Hidden states (T, H) to the residual and what is to be added to it. May write into ``x``."""
        delta: Tensor | None = None
        with self._workspace.active():
            for index, layer in enumerate(self._layers):
                self._workspace.new_turn()
                x, delta = layer(x, delta, index, pages, view, None if layer.rotary is None else angles[layer.rotary])
        return x, delta

    def remember(self, encoded: Tensor, pages: KVPages, prompts: PromptsView) -> None:
        """Show (S, H) of the encoder to every layer, for its cross-attention."""
        for index, layer in enumerate(self._layers):
            layer.remember(encoded, index, pages, prompts)


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
