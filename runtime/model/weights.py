"""A layer's tensors by the names that parameters.py gives them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from shardray.parallel.quantized import Int8Weight, Weight
from shardray.runtime.model.parameters import SCALE

Parameters = Mapping[str, Tensor]


def below(prefix: str, parameters: Parameters) -> Parameters:
    """Those whose names begin with ``prefix``, without it"""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def weight_of(parameters: Parameters, name: str) -> Weight:
    """What the Linear of that name reads."""
    weight, scales = parameters[f"{name}.weight"], parameters.get(f"{name}.weight{SCALE}")
    return weight if scales is None else Int8Weight(weight, scales)
