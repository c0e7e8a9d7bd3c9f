"""The angles of rotary positions, by the inverse frequencies of each published scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardray.runtime.model.kernels.ops import Angles
from shardray.runtime.model.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    YarnScaling,
)


def rotary_angles(rotary: Rotary, num_positions: int) -> Angles:
    """Those of all positions, with the scaling's factor multiplied in."""
    frequencies, factor = _inverse_frequencies(rotary, num_positions)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return Angles(angles.cos() * factor, angles.sin() * factor, rotary.interleaved)


def _inverse_frequencies(rotary: Rotary, num_positions: int) -> tuple[Tensor, float]:
    """(dim // 2,) float32, and the factor on cosines and sines.

    Where a scaling depends on the length of the context, it is that of the longest one that is served: what a token is
    does not depend on how far its sequence has come.
    """
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.int64).to(torch.float32) / rotary.dim
    plain = 1.0 / (rotary.theta**exponents)
    match rotary.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor):
            return plain / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(plain, rotary, scaling), _yarn_factor(scaling)
        case DynamicScaling(factor, trained):
            stretched = factor * max(num_positions, trained) / trained - (factor - 1)
            return 1.0 / ((rotary.theta * stretched ** (rotary.dim / (rotary.dim - 2))) ** exponents), 1.0
        case LongRopeScaling() as scaling:
            is_long = num_positions > scaling.original_max_position
            return plain / torch.tensor(
                scaling.long_factors if is_long else scaling.short_factors
            ), scaling.attention_factor


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_max_position * plain / (2 * math.pi)  # rotations within the trained window
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: Tensor, rotary: Rotary, scaling: YarnScaling) -> Tensor:
    def dimension_with(turns: float) -> float:
        span = scaling.original_max_position / (turns * 2 * math.pi)
        return rotary.dim * math.log(span) / (2 * math.log(rotary.theta))

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    interpolated = ((torch.arange(rotary.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / scaling.factor * interpolated + plain * (1.0 - interpolated)


def _yarn_factor(scaling: YarnScaling) -> float:
    def mscale(multiplier: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * multiplier * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
