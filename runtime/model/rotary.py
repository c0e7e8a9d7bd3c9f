"""Rotary positions as a model's config has them. Their angles: ``rotary_angles.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardray.runtime.model.config_json import Config, nearest_of
from shardray.runtime.model.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)
from shardray.runtime.model.spec import ModelConfigError

_DEFAULT_THETA = 10_000.0
_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


def read_rotary(config: Config, head_dim: int) -> Rotary:
    """``rope_theta`` and ``rope_scaling``, or the newer ``rope_parameters`` that holds both; the older one wins.

    What counts where a file has several of them is as in transformers' modeling_rope_utils.py.
    Raises ModelConfigError for a scaling that is not known or lacks a field.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ModelConfigError(f"config.json: rope_scaling is {parameters!r}, expected an object")
    both = config | {field: value for field, value in parameters.items() if value is not None}
    dim = int(head_dim * _number(both, "partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2:
        raise ModelConfigError(f"config.json: rotary positions need an even number of elements of each head, not {dim}")
    return Rotary(_number(both, "rope_theta", _DEFAULT_THETA), dim, _read_scaling(parameters, config, dim))


def with_rotary_of(config: Config, kind: str, theta: float, is_scaled: bool = True) -> Config:
    """The config as it would be if all layers were of one kind, of ``theta`` by default.

    Newer ones have ``rope_parameters`` for each kind; the ``rope_scaling`` of older ones is that of the kinds that are
    ``is_scaled``.
    """
    given = (config.get("rope_parameters") or {}).get(kind) or {}
    scaling = (config.get("rope_scaling") or {}) if is_scaled else {}
    return config | {"rope_parameters": {"rope_theta": theta, **given, **scaling}, "rope_scaling": None}


def _read_scaling(parameters: Mapping[str, Any], config: Config, dim: int) -> Scaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(_number(parameters, "factor"))
    if kind == "llama3":
        return _read_llama3(parameters, _trained_positions(parameters, config))
    if kind == "yarn":
        return _read_yarn(parameters, config)
    if kind == "dynamic":
        return DynamicScaling(_number(parameters, "factor"), int(_number(config, "max_position_embeddings")))
    if kind in ("longrope", "su"):  # as Phi 3 called it first
        return _read_longrope(parameters, config, dim)
    raise ModelConfigError(f"config.json: rope_type {kind!r} is not supported; {nearest_of(kind, _KINDS)}")


def _read_llama3(parameters: Mapping[str, Any], trained: int) -> Llama3Scaling:
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if not low < high:
        raise ModelConfigError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    return Llama3Scaling(_number(parameters, "factor"), low, high, trained)


def _read_yarn(parameters: Mapping[str, Any], config: Config) -> YarnScaling:
    trained = _trained_positions(parameters, config)
    return YarnScaling(
        factor=_factor(parameters, config, trained),
        original_max_position=trained,
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        attention_factor=_maybe(parameters, "attention_factor"),
        mscale=_maybe(parameters, "mscale"),
        mscale_all_dim=_maybe(parameters, "mscale_all_dim"),
        truncate=bool(parameters.get("truncate", True)),
    )


def _read_longrope(parameters: Mapping[str, Any], config: Config, dim: int) -> LongRopeScaling:
    trained = _trained_positions(parameters, config)
    factor = _factor(parameters, config, trained)
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return LongRopeScaling(
        _factors(parameters, "short_factor", dim),
        _factors(parameters, "long_factor", dim),
        trained,
        _maybe(parameters, "attention_factor") or usual,
    )


def _factors(parameters: Mapping[str, Any], field: str, dim: int) -> tuple[float, ...]:
    """One for each frequency"""
    factors = parameters.get(field)
    if not isinstance(factors, list) or len(factors) != dim // 2:
        raise ModelConfigError(f"config.json: {field} of the rotary scaling has to be a list of {dim // 2} factors")
    return tuple(float(factor) for factor in factors)


def _factor(parameters: Mapping[str, Any], config: Config, trained: int) -> float:
    """By how much the window was stretched."""
    return _number(parameters, "factor", (_maybe(config, "max_position_embeddings") or trained) / trained)


def _trained_positions(parameters: Mapping[str, Any], config: Config) -> int:
    """The window before it was stretched."""
    field = "original_max_position_embeddings"
    trained = _maybe(config, field) or _maybe(parameters, field) or _maybe(config, "max_position_embeddings")
    if trained is None:
        raise ModelConfigError(f"config.json: the rotary scaling lacks {field!r}")
    return int(trained)


def _maybe(fields: Mapping[str, Any], field: str) -> float | None:
    """A positive number; None where the field is absent, null or zero."""
    value = fields.get(field)
    if not value:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected a positive number")
    return float(value)


def _number(fields: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = _maybe(fields, field) or default
    if value is None:
        raise ModelConfigError(f"config.json: the rotary scaling lacks {field!r}")
    return value


def longest_context(rotary: Rotary | None, max_positions: int) -> int:
    """How many tokens a model of ``max_position_embeddings`` can take: more of them where its scaling allows it."""
    if rotary is not None and isinstance(rotary.scaling, DynamicScaling):
        return int(rotary.scaling.factor * max_positions)
    return max_positions
