"""Model folders written: checkpoints in shards, and the small files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shardray.parallel.checkpoint import INDEX_FILE

MAX_SHARD_BYTES = 2 * 1024**3  # one shard is held in memory while it is written


def save_in_shards(
    folder: Path, num_bytes: Mapping[str, int], make: Callable[[str], Mapping[str, torch.Tensor]]
) -> None:
    """Write a checkpoint of what ``make`` gives for each name of ``num_bytes``, which says how large that will be."""
    shards = _group(num_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"model{part}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors |= make(name)
        weight_map |= dict.fromkeys(tensors, path.name)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # written as 0600, which hides a shared cache from others
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def _group(num_bytes: Mapping[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in num_bytes.items():
        if shards[-1] and shard_bytes + size > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
