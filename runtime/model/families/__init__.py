"""The families: one small file each, from ``config.json`` to a DecoderSpec and from checkpoint names to parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardray.runtime.model.families.family import Family, nearest_of
from shardray.runtime.model.families.gpt2 import GPT2
from shardray.runtime.model.families.llama import LLAMA
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

FAMILIES = (LLAMA, GPT2)

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def read_model_config(folder: Path) -> tuple[Family, DecoderSpec]:
    """The family and the spec of a model folder. Raises ModelConfigError naming the field that is not supported."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{path}: is not a JSON object")
    family = _family_of(config)
    if config.get("quantization_config"):
        raise ModelConfigError("config.json: quantization_config: quantized checkpoints are not supported")
    return family, family.read_config(config)


def _family_of(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    hint = nearest_of(model_type, _BY_MODEL_TYPE)
    raise ModelConfigError(f"config.json: model_type {model_type!r} is not supported; {hint}")
