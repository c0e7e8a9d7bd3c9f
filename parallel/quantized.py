"""Weights of 8 bits: whole numbers, and a scale for each output that makes the weight of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardray.parallel.rows import join_rows

LARGEST = 127  # of the numbers; so the smallest is its opposite


class Int8Weight(NamedTuple):
    """``values * scales``, as a Linear reads it."""

    values: Tensor  # (N, K) int8
    scales: Tensor  # (N, 1) float32


Weight = Tensor | Int8Weight


def quantize(weight: Tensor) -> Int8Weight:
    """The nearest there is to (..., N, K) floats: the largest of each output's weights becomes 127 or -127."""
    weight = weight.float()
    scales = weight.abs().amax(dim=-1, keepdim=True) / LARGEST
    values = torch.round(weight / torch.where(scales > 0, scales, 1.0))
    return Int8Weight(values.to(torch.int8), scales)


def join_weights(parts: Sequence[Weight]) -> Weight:
    """Their rows, one after the other; no copy is made of parts that lie so already. All or none have 8 bits."""
    floats = [part for part in parts if isinstance(part, Tensor)]
    if floats:
        return join_rows(floats)
    quantized = [part for part in parts if isinstance(part, Int8Weight)]
    return Int8Weight(join_rows([one.values for one in quantized]), join_rows([one.scales for one in quantized]))
