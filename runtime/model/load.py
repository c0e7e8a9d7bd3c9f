"""Reads from a checkpoint what one rank owns, and nothing else.

The whole checkpoint is checked against the spec first, from its headers alone: missing, unexpected and ill-shaped
tensors are all named before a byte of weights is read.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.parallel.filling import DirectFilling, Filling
from shardray.parallel.kept import is_there_already, keep
from shardray.parallel.layers import is_packed
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.families.family import Family, Source, swap_last
from shardray.runtime.model.mxfp4 import is_packed as is_mxfp4
from shardray.runtime.model.mxfp4 import packed_shapes, read_packed
from shardray.runtime.model.parameters import (
    ENCODER,
    Parameter,
    embedding_parameters,
    encoder_end_parameters,
    head_parameters,
    layer_parameters,
)
from shardray.runtime.model.spec import DecoderSpec

_MAX_NAMED = 8
_MERGED = (("q", "k", "v"), ("gate", "up"), ("cross.k", "cross.v"), ("shared.gate", "shared.up"))
Parameters = dict[str, Tensor]


class ParameterLoader:
    """One rank's reader: whole parameters in the checkpoint, owned slices out, in the model's dtype, on its device.

    ``num_bytes``: of all that was read so far, as it is held.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        spec: DecoderSpec,
        plan: ShardPlan,
        tp_rank: int,
        dtype: torch.dtype,
        filling: Filling | None = None,
    ) -> None:
        """``filling``: how weights come to the device; by default they stay on the CPU."""
        self._checkpoint = checkpoint
        self._sources = family.sources(spec)
        self._prefix = _stored_prefix(checkpoint, family)
        self._spec = spec
        self._plan = plan
        self._tp_rank = tp_rank
        self._dtype = dtype
        self._filling = filling or DirectFilling(torch.device("cpu"))
        self.num_bytes = 0
        self._embedding: Tensor | None = None  # kept for a tied head on the same rank
        self._check(family)

    def embedding(self) -> Parameters:
        found = self._load(embedding_parameters(self._spec))
        self._embedding = found.get("embed.weight")
        return found

    def head(self) -> Parameters:
        """A head tied to an embedding that this loader has read is that same tensor."""
        parameters = head_parameters(self._spec)
        if not self._spec.head.tied or self._embedding is None:
            return self._load(parameters)
        del parameters["head.weight"]
        return self._load(parameters) | {"head.weight": self._embedding}

    def encoder_end(self) -> Parameters:
        return self._load(encoder_end_parameters(self._spec))

    def layer(self, index: int) -> Parameters:
        """Of all layers, those of an encoder first."""
        return self._load(layer_parameters(self._spec, self._spec.all_layers[index]), *_place(self._spec, index))

    def _load(self, parameters: dict[str, Parameter], prefix: str = "", layer: int | None = None) -> Parameters:
        found: Parameters = {}
        for names in _groups(parameters):
            group = {name: parameters[name] for name in names}
            sources = [self._sources[prefix + name] for name in names]
            found |= self._load_group(group, sources, layer)
        self._filling.finish()
        self.num_bytes += sum(tensor.nbytes for tensor in found.values())
        return {name: found[name] for name in parameters}

    def _load_group(self, group: dict[str, Parameter], sources: list[Source], layer: int | None) -> Parameters:
        """What this rank owns of parameters that lie one after the other."""
        shapes = [_shape(parameter.owned(self._plan, self._tp_rank)) for parameter in group.values()]
        rows = [shape[0] for shape in shapes]

        def fill(whole: Tensor) -> None:
            parts = torch.split(whole, rows)
            for target, source, parameter in zip(parts, sources, group.values(), strict=True):
                self._fill(target, source, parameter, layer)

        dtype = torch.float32 if any(one.in_float32 for one in group.values()) else self._dtype
        whole = self._hold((sum(rows), *shapes[0][1:]), dtype, all(one.multiplied for one in group.values()), fill)
        return dict(zip(group, torch.split(whole, rows), strict=True))

    def _hold(
        self, shape: tuple[int, ...], dtype: torch.dtype, multiplied: bool, fill: Callable[[Tensor], None]
    ) -> Tensor:
        """Memory for a group. What is only packed by layers is kept by them, and not read if it is there already."""
        device = self._filling.device
        is_kept = device.type == "cpu" and not (multiplied and is_packed(device.type, dtype))
        if is_kept:
            return keep(shape, dtype, fill)
        if is_there_already() and math.prod(shape) > 0:
            return torch.empty(shape, dtype=dtype, device="meta")
        whole = torch.empty(shape, dtype=dtype, device=device)
        fill(whole)
        return whole

    def _fill(self, target: Tensor, source: Source, parameter: Parameter, layer: int | None) -> None:
        rows, *rest = parameter.owned(self._plan, self._tp_rank)
        if source.has_row_tensors:
            for row, part in zip(range(rows.start, rows.stop), target, strict=True):
                self._fill_piece(part, source.name.format(layer=layer, row=row), tuple(rest), False)
            return
        stored = source.name.format(layer=layer)
        if source.is_row:
            self._fill_piece(target[None], stored, (slice(0, 1), rows), False)
            return
        done = 0
        for piece in source.rows(rows):
            count = piece.stop - piece.start
            self._fill_piece(target[done : done + count], stored, (piece, *rest), source.transposed)
            done += count

    def _fill_piece(self, target: Tensor, name: str, index: tuple[slice, ...], transposed: bool) -> None:
        stored = self._stored_name(name)
        if is_mxfp4(self._checkpoint, stored):
            target.copy_(read_packed(self._checkpoint, stored, index))
        elif transposed:
            self._filling.fill(target.transpose(-1, -2), self._checkpoint, stored, swap_last(index))
        else:
            self._filling.fill(target, self._checkpoint, stored, index)

    def _stored_name(self, name: str) -> str:
        """With the checkpoint's prefix, except for what such checkpoints keep outside of it."""
        tensors = self._checkpoint.tensors
        return name if name in tensors and self._prefix + name not in tensors else self._prefix + name

    def _check(self, family: Family) -> None:
        """Raise CheckpointError naming all that is missing, ill-shaped or unexpected."""
        present, needed = self._checkpoint.tensors, self._needed_shapes()
        ignored = [pattern.format(num_layers=self._spec.num_layers) for pattern in family.ignored]
        unexpected = (name for name in present.keys() - needed.keys() if not _matches(name, ignored))
        problems = {
            "missing": sorted(needed.keys() - present.keys()),
            "unexpected": sorted(unexpected),
            "of another shape than config.json says": [
                f"{name} {present[name].shape} instead of {shape}"
                for name, shape in needed.items()
                if name in present and present[name].shape != shape
            ],
        }
        if any(problems.values()):
            found = "; ".join(f"{what}: {_name_some(names)}" for what, names in problems.items() if names)
            raise CheckpointError(f"{self._checkpoint.folder}: does not hold this model's tensors. {found}")

    def _needed_shapes(self) -> dict[str, tuple[int, ...]]:
        """For each tensor of the checkpoint, the shape that holds all that is read from it."""
        needed: dict[str, tuple[int, ...]] = {}
        for prefix, layer, parameters in _all_parameters(self._spec):
            for name, parameter in parameters.items():
                for stored, shape in self._sources[prefix + name].stored_shapes(parameter.shape, layer).items():
                    full_name = self._stored_name(stored)
                    if is_mxfp4(self._checkpoint, full_name):
                        needed |= packed_shapes(full_name, parameter.shape)
                    else:
                        needed[full_name] = max(needed.get(full_name, shape), shape)
        return needed


def _shape(owned: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in owned)


def _groups(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All names, those together that layers merge into one product."""
    left = dict.fromkeys(names)
    for merged in _MERGED:
        for part in ("weight", "bias"):
            group = tuple(f"{name}.{part}" for name in merged)
            if all(name in left for name in group):
                yield group
                for name in group:
                    del left[name]
    yield from ((name,) for name in left)


def _stored_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The first of the family's prefixes that any of the checkpoint's names has."""
    return next(prefix for prefix in family.prefixes if any(name.startswith(prefix) for name in checkpoint.tensors))


def _all_parameters(spec: DecoderSpec) -> Iterable[tuple[str, int | None, dict[str, Parameter]]]:
    """With the prefix of their names and the index of their layer."""
    yield "", None, embedding_parameters(spec) | encoder_end_parameters(spec) | head_parameters(spec)
    for index, layer in enumerate(spec.all_layers):
        yield *_place(spec, index), layer_parameters(spec, layer)


def _place(spec: DecoderSpec, index: int) -> tuple[str, int]:
    """How the names of a layer's parameters begin, and its index in the encoder or the decoder."""
    return (ENCODER, index) if index < spec.num_encoder_layers else ("", index - spec.num_encoder_layers)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
