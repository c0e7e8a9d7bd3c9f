"""A model folder written anew with weights of 8 bits."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.quantized import quantize
from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.folder import read_object
from shardray.runtime.model.model_cache import ModelSourceError, Progress, silent
from shardray.runtime.model.parameters import SCALE
from shardray.runtime.model.quantization import HEAD, describe, in_int8
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError
from shardray.runtime.model.stored import Stored
from shardray.runtime.model.writing import save_in_shards, write_json

_TIED = "tie_word_embeddings"
_COPIED = {".json", ".jinja", ".model", ".txt", ".md"}


def quantize_folder(source: Path, folder: Path, progress: Progress = silent) -> None:
    """Write the model in ``source`` into the empty ``folder``, with what its linear layers multiply with in 8 bits.

    A head that is tied to the embedding gets a weight of its own, so that the embedding stays as it is. Raises
    ModelSourceError for a model that is quantized already, CheckpointError for one whose tensors are not all there.
    """
    config = read_object(source / "config.json")
    if config.get("quantization_config"):
        raise ModelSourceError(f"{source}: is quantized already; quantize the float checkpoint that it was made of")
    family, spec = read_model_config(source)
    checkpoint = Checkpoint(source)
    Stored(checkpoint, family, spec).check()
    if spec.head.tied and _can_be_untied(family, spec, config):
        config |= {_TIED: False}
        spec = replace(spec, head=replace(spec.head, tied=False))
    quantization = describe(ignored=[HEAD] if spec.head.tied else [])
    _copy_small_files(source, folder)
    write_json(folder / "config.json", config | {"quantization_config": quantization})
    _write_weights(checkpoint, family, in_int8(spec, quantization), folder, progress)


def stored_bytes(folder: Path) -> int:
    """Of all tensors of a checkpoint."""
    return sum(info.num_bytes for info in Checkpoint(folder).tensors.values())


def _can_be_untied(family: Family, spec: DecoderSpec, config: dict[str, Any]) -> bool:
    """Whether the config of an untied head says the same of everything else."""
    try:
        untied = family.read_config(Config(config | {_TIED: False}))
    except ModelConfigError:
        return False
    is_alike = replace(untied, head=replace(untied.head, tied=True)) == spec
    return is_alike and not untied.head.tied and "head.weight" in family.sources(untied)


def _write_weights(checkpoint: Checkpoint, family: Family, spec: DecoderSpec, folder: Path, progress: Progress) -> None:
    stored = Stored(checkpoint, family, spec)
    transposed = {part.name: part.transposed for part in stored.parts() if part.parameter.in_int8}
    held = {name: name for name in checkpoint.tensors}
    if spec.head.in_int8:
        head, embedding = (stored.full_name(stored.sources[f"{name}.weight"].name) for name in ("head", "embed"))
        held.setdefault(head, embedding)
    done = 0

    def make(name: str) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        progress("Quantizing", done, len(held))
        tensor = checkpoint.read(held[name])
        if name not in transposed:
            return {name: tensor}
        values, scales = quantize(tensor.mT if transposed[name] else tensor)
        return {name: (values.mT if transposed[name] else values).contiguous(), name + SCALE: scales}

    infos = {name: checkpoint.tensors[held[name]] for name in held}
    sizes = {name: math.prod(info.shape) if name in transposed else info.num_bytes for name, info in infos.items()}
    save_in_shards(folder, sizes, make)


def _copy_small_files(source: Path, folder: Path) -> None:
    """What tells of tokens, texts and licences"""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        is_index = path.name.endswith(".index.json")
        if path.is_file() and (path.suffix in _COPIED or path.stem == "LICENSE") and not is_index:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
