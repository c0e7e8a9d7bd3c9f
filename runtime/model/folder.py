"""The small JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardray.runtime.model.model_cache import ModelSourceError


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file. Raises ModelSourceError if it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelSourceError(f"{path}: is not a JSON object")
    return content


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text: those of ``generation_config.json``, or of ``config.json`` where that names none."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return frozenset({value})
        if isinstance(value, list) and value:
            return frozenset(int(token_id) for token_id in value)
    return frozenset()
