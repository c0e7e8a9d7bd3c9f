"""Reads from a checkpoint what one rank owns, and nothing else.

The whole checkpoint is checked against the spec first, from its headers alone: missing, unexpected and ill-shaped
tensors are all named before a byte of weights is read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.families.family import Family, Source
from shardray.runtime.model.parameters import (
    Parameter,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from shardray.runtime.model.spec import DecoderSpec

_MAX_NAMED = 8
Parameters = dict[str, Tensor]


class ParameterLoader:
    """One rank's reader: whole parameters in the checkpoint, owned slices out, in the model's dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        spec: DecoderSpec,
        plan: ShardPlan,
        tp_rank: int,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint = checkpoint
        self._sources = family.sources(spec)
        self._prefixes = family.prefixes
        self._spec = spec
        self._plan = plan
        self._tp_rank = tp_rank
        self._dtype = dtype
        _check(checkpoint, family, spec, self._stored_name)

    def embedding(self) -> Parameters:
        return self._load(embedding_parameters(self._spec), None)

    def head(self) -> Parameters:
        return self._load(head_parameters(self._spec), None)

    def layer(self, index: int) -> Parameters:
        return self._load(layer_parameters(self._spec), index)

    def _load(self, parameters: dict[str, Parameter], layer: int | None) -> Parameters:
        return {name: self._read(name, parameter, layer) for name, parameter in parameters.items()}

    def _read(self, name: str, parameter: Parameter, layer: int | None) -> Tensor:
        source = self._sources[name]
        index = _shift(parameter.owned(self._plan, self._tp_rank), source.start)
        if source.transposed:
            index = index[::-1]
        tensor = self._checkpoint.read(self._stored_name(source, layer), index).to(self._dtype)
        return tensor.t().contiguous() if source.transposed else tensor

    def _stored_name(self, source: Source, layer: int | None) -> str:
        name = source.name.format(layer=layer)
        found = (prefix + name for prefix in self._prefixes if prefix + name in self._checkpoint.tensors)
        return next(found, self._prefixes[0] + name)


def _shift(index: tuple[slice, ...], start: int) -> tuple[slice, ...]:
    return (slice(index[0].start + start, index[0].stop + start), *index[1:])


def _check(
    checkpoint: Checkpoint, family: Family, spec: DecoderSpec, stored_name: Callable[[Source, int | None], str]
) -> None:
    """Raise CheckpointError naming what is missing, ill-shaped or unexpected."""
    needed: dict[str, tuple[int, ...]] = {}  # stored name -> the least shape that holds all that is read from it
    sources = family.sources(spec)
    for layer, parameters in _all_parameters(spec):
        for name, parameter in parameters.items():
            source = sources[name]
            shape = (parameter.shape[0] + source.start, *parameter.shape[1:])
            stored = stored_name(source, layer)
            shape = shape[::-1] if source.transposed else shape
            needed[stored] = max(needed.get(stored, shape), shape)
    present = checkpoint.tensors
    wrong = [
        f"{name} has shape {present[name].shape}, expected {shape}"
        for name, shape in needed.items()
        if name in present and present[name].shape != shape
    ]
    _refuse(checkpoint, "lacks", sorted(needed.keys() - present.keys()))
    _refuse(checkpoint, "does not fit config.json:", wrong)
    _refuse(checkpoint, "has unexpected tensors", sorted(_unexpected(present.keys() - needed.keys(), family)))


def _all_parameters(spec: DecoderSpec) -> Iterable[tuple[int | None, dict[str, Parameter]]]:
    yield None, embedding_parameters(spec) | head_parameters(spec)
    layer = layer_parameters(spec)
    yield from ((index, layer) for index in range(spec.num_layers))


def _unexpected(names: Iterable[str], family: Family) -> list[str]:
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored)]


def _refuse(checkpoint: Checkpoint, what: str, found: list[str]) -> None:
    if found:
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise CheckpointError(f"{checkpoint.folder} {what} {'; '.join(found[:_MAX_NAMED])}{more}")
