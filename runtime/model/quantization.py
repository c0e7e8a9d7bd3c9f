"""Checkpoints whose weights have 8 bits: how ``config.json`` says so, read and written.

The format is "int-quantized" of compressed-tensors (https://github.com/neuralmagic/compressed-tensors): beside each
``weight`` of whole numbers a ``weight_scale`` with one scale for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

METHOD, _FORMAT = "compressed-tensors", "int-quantized"
HEAD = "lm_head"
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def describe(ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in which all linear layers but ``ignored`` ones have 8 bits."""
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {**_WEIGHTS, "dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": METHOD, "format": _FORMAT, "quantization_status": "compressed", "ignore": ignored,
        "config_groups": {"group_0": group},
    }  # fmt: skip


def in_int8(spec: DecoderSpec, quantization: Mapping[str, Any]) -> DecoderSpec:
    """``spec`` with the weights in 8 bits that ``quantization`` says. Raises ModelConfigError for other formats."""
    groups = quantization.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    stored = quantization.get("format") or (group or {}).get("format")
    if stored != _FORMAT or not isinstance(weights, dict) or any(weights.get(k) != v for k, v in _WEIGHTS.items()):
        raise ModelConfigError(
            f"config.json: quantization_config: of {METHOD}, weights of 8 bits with a scale for each output are read "
            f"(format {_FORMAT}, strategy channel, symmetric); shardray quantize makes them of a float checkpoint"
        )
    has_head = not spec.head.tied and HEAD not in (quantization.get("ignore") or ())
    return replace(spec, in_int8=True, head=replace(spec.head, in_int8=has_head))
