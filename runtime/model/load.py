"""Reads from a checkpoint what one rank owns, and nothing else.

The whole checkpoint is checked against the spec first, from its headers alone: missing, unexpected and ill-shaped
tensors are all named before a byte of weights is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.filling import DirectFilling, Filling
from shardray.parallel.kept import is_there_already, keep
from shardray.parallel.layers import is_packed
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.families.family import Family, Source, swap_last
from shardray.runtime.model.mxfp4 import is_packed as is_mxfp4
from shardray.runtime.model.mxfp4 import read_packed
from shardray.runtime.model.parameters import (
    SCALE,
    Parameter,
    embedding_parameters,
    encoder_end_parameters,
    head_parameters,
    layer_parameters,
)
from shardray.runtime.model.spec import DecoderSpec
from shardray.runtime.model.stored import Stored, place_of_layer

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
        self._stored = Stored(checkpoint, family, spec)
        self._stored.check()
        self._spec = spec
        self._plan = plan
        self._tp_rank = tp_rank
        self._dtype = dtype
        self._filling = filling or DirectFilling(torch.device("cpu"))
        self.num_bytes = 0
        self._embedding: Tensor | None = None  # kept for a tied head on the same rank

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
        return self._load(
            layer_parameters(self._spec, self._spec.all_layers[index]), *place_of_layer(self._spec, index)
        )

    def _load(self, parameters: dict[str, Parameter], prefix: str = "", layer: int | None = None) -> Parameters:
        found: Parameters = {}
        for names in _groups(parameters):
            group = {name: parameters[name] for name in names}
            sources = [self._stored.sources[prefix + name] for name in names]
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

        [dtype] = {self._dtype_of(one) for one in group.values()}
        whole = self._hold((sum(rows), *shapes[0][1:]), dtype, all(one.multiplied for one in group.values()), fill)
        return dict(zip(group, torch.split(whole, rows), strict=True))

    def _dtype_of(self, parameter: Parameter) -> torch.dtype:
        if parameter.in_int8:
            return torch.int8
        return torch.float32 if parameter.in_float32 else self._dtype

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
        stored = self._stored.full_name(name)
        if is_mxfp4(self._checkpoint, stored):
            target.copy_(read_packed(self._checkpoint, stored, index))
        elif transposed:
            self._filling.fill(target.transpose(-1, -2), self._checkpoint, stored, swap_last(index))
        else:
            self._filling.fill(target, self._checkpoint, stored, index)


def _shape(owned: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in owned)


def _groups(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All names, those together that layers merge into one product."""
    left = dict.fromkeys(names)
    for merged in _MERGED:
        for part in ("weight", f"weight{SCALE}", "bias"):
            group = tuple(f"{name}.{part}" for name in merged)
            if all(name in left for name in group):
                yield group
                for name in group:
                    del left[name]
    yield from ((name,) for name in left)
