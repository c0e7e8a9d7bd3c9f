"""Rotary positions: the config's fields, and the inverse frequencies of each published scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardray.runtime.model.spec import (
    LinearScaling,
    Llama3Scaling,
    ModelConfigError,
    Rotary,
    Scaling,
    YarnScaling,
)

_DEFAULT_THETA = 10_000.0


def read_rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """``rope_theta`` and ``rope_scaling``, or the newer ``rope_parameters`` that holds both.

    Raises ModelConfigError for a scaling that is not known or lacks a field.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA)
    share = float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    return Rotary(theta, int(head_dim * share), _read_scaling(parameters, config))


def _read_scaling(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Scaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    trained = parameters.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(float(parameters["factor"]))
        if kind == "llama3":
            low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
            return Llama3Scaling(float(parameters["factor"]), low, high, int(trained or 0))
        if kind == "yarn":
            return _read_yarn(parameters, int(trained or 0))
    except KeyError as error:
        raise ModelConfigError(f"config.json: rope_scaling of type {kind!r} lacks {error.args[0]!r}") from None
    raise ModelConfigError(
        f"config.json: rope_type {kind!r} is not supported (supported: default, linear, llama3, yarn)"
    )


def _read_yarn(parameters: Mapping[str, Any], trained: int) -> YarnScaling:
    return YarnScaling(
        factor=float(parameters["factor"]),
        original_max_position=trained,
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        attention_factor=parameters.get("attention_factor"),
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
        truncate=bool(parameters.get("truncate", True)),
    )


def rotary_table(rotary: Rotary, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (num_positions, rotary.dim // 2), float32, with the scaling's factor multiplied in."""
    frequencies, factor = _inverse_frequencies(rotary)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return angles.cos() * factor, angles.sin() * factor


def _inverse_frequencies(rotary: Rotary) -> tuple[Tensor, float]:
    """(dim // 2,) float32, and the factor on cosines and sines."""
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
