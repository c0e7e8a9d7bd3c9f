"""From token ids to hidden states: token, position and type embeddings.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import VocabParallelEmbedding
from shardray.runtime.model.kernels.ops import NormWeights
from shardray.runtime.model.positions import Sinusoidal
from shardray.runtime.model.spec import Embedding
from shardray.runtime.model.weights import Parameters


class TokenEmbedding:
    """One rank's part: its rows of the vocabulary from ``first_row`` on, and all the rest."""

    def __init__(self, embedding: Embedding, first_row: int, comm: Comm, parameters: Parameters) -> None:
        weight, positions = parameters["embed.weight"], embedding.positions
        self._tokens = VocabParallelEmbedding(weight, first_row, comm)
        self._projection = parameters.get("embed_projection.weight")
        self._scale = torch.tensor(embedding.scale).to(weight.dtype).item()  # as rounded in the model's dtype
        self._positions = parameters.get("positions.weight")
        if isinstance(positions, Sinusoidal):
            self._positions = sinusoidal_table(positions, weight.shape[1]).to(weight)
        self._offset = 0 if positions is None else positions.offset
        self._type = parameters["types.weight"][0] if embedding.num_types else None
        self._norm = None if embedding.norm is None else NormWeights.of(embedding.norm, "embed_norm", parameters)

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """(T,) and (T,) -> (T, H)"""
        x = self._tokens(token_ids)
        if self._projection is not None:
            x = F.linear(x, self._projection)
        if self._scale != 1.0:
            x = x * self._scale
        if self._positions is not None:
            x = x + self._positions[positions + self._offset]
        if self._type is not None:
            x = x + self._type
        return x if self._norm is None else self._norm(x)


def sinusoidal_table(positions: Sinusoidal, size: int) -> Tensor:
    """(positions, size) float32, made in float64; an odd ``size`` ends with a sine, or in halves with a zero."""
    count = size // 2 if positions.in_halves else -(-size // 2)
    last = count - 1 if positions.reaches_end else size / 2
    frequencies = torch.exp(torch.arange(count, dtype=torch.float64) * (-math.log(10_000.0) / last))
    places = torch.arange(positions.num_positions + positions.offset, dtype=torch.float64)
    angles = places[:, None] * frequencies
    if positions.in_halves:
        table = F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, size - 2 * count))
    else:
        table = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :size]
    return table.float()
