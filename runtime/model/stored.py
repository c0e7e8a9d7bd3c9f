"""What a checkpoint keeps of a model, under which names, and whether all of it is there."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.runtime.model.families.family import Family, scale_source
from shardray.runtime.model.mxfp4 import is_packed as is_mxfp4
from shardray.runtime.model.mxfp4 import packed_shapes
from shardray.runtime.model.parameters import (
    ENCODER,
    SCALE,
    Parameter,
    embedding_parameters,
    encoder_end_parameters,
    head_parameters,
    layer_parameters,
)
from shardray.runtime.model.spec import DecoderSpec

_MAX_NAMED = 8


class StoredPart(NamedTuple):
    """A tensor, and what it holds all or a part of."""

    name: str
    parameter: Parameter
    shape: tuple[int, ...]  # that the tensor needs for it
    transposed: bool


class Stored:
    """The tensors of a checkpoint, looked at through its headers alone. ``sources``: by the names of parameters."""

    def __init__(self, checkpoint: Checkpoint, family: Family, spec: DecoderSpec) -> None:
        sources = family.sources(spec)
        self.sources = sources | {name + SCALE: scale_source(source) for name, source in sources.items()}
        self._tensors, self._checkpoint, self._family, self._spec = checkpoint.tensors, checkpoint, family, spec
        # The first of the family's prefixes that any of the checkpoint's names has
        self._prefix = next(p for p in family.prefixes if any(name.startswith(p) for name in checkpoint.tensors))

    def full_name(self, name: str) -> str:
        """With the checkpoint's prefix, except for what such checkpoints keep outside of it."""
        return name if name in self._tensors and self._prefix + name not in self._tensors else self._prefix + name

    def parts(self) -> Iterator[StoredPart]:
        """Of all parameters. A tensor that holds several comes once for each."""
        for prefix, layer, parameters in _all_parameters(self._spec):
            for name, parameter in parameters.items():
                source = self.sources[prefix + name]
                for stored, shape in source.stored_shapes(parameter.shape, layer).items():
                    yield StoredPart(self.full_name(stored), parameter, shape, source.transposed)

    def check(self) -> None:
        """Raise CheckpointError naming all that is missing, unexpected or not as it should be."""
        present, needed = self._tensors, self._needed_shapes()
        ignored = [pattern.format(num_layers=self._spec.num_layers) for pattern in self._family.ignored]
        unexpected = (name for name in present.keys() - needed.keys() if not _matches(name, ignored))
        problems = {
            "missing": sorted(needed.keys() - present.keys()),
            "unexpected": sorted(unexpected),
            "of another shape than config.json says": [
                f"{name} {present[name].shape} instead of {shape}"
                for name, shape in needed.items()
                if name in present and present[name].shape != shape
            ],
            "of another kind than config.json says": sorted(self._of_other_kinds()),
        }
        if any(problems.values()):
            found = "; ".join(f"{what}: {_name_some(names)}" for what, names in problems.items() if names)
            raise CheckpointError(f"{self._checkpoint.folder}: does not hold this model's tensors. {found}")

    def _needed_shapes(self) -> dict[str, tuple[int, ...]]:
        """For each tensor of the checkpoint, the shape that holds all that is read from it."""
        needed: dict[str, tuple[int, ...]] = {}
        for part in self.parts():
            if is_mxfp4(self._checkpoint, part.name):
                needed |= packed_shapes(part.name, part.parameter.shape)
            else:
                needed[part.name] = max(needed.get(part.name, part.shape), part.shape)
        return needed

    def _of_other_kinds(self) -> set[str]:
        """Whole numbers where floats are expected, and the other way round."""
        found = ((self._tensors.get(part.name), part.parameter.in_int8) for part in self.parts())
        return {f"{info.name} {info.stored}" for info, in_int8 in found if info and (info.stored == "I8") != in_int8}


def place_of_layer(spec: DecoderSpec, index: int) -> tuple[str, int]:
    """How the names of a layer's parameters begin, and its index in the encoder or the decoder."""
    return (ENCODER, index) if index < spec.num_encoder_layers else ("", index - spec.num_encoder_layers)


def _all_parameters(spec: DecoderSpec) -> Iterable[tuple[str, int | None, dict[str, Parameter]]]:
    """With the prefix of their names and the index of their layer."""
    yield "", None, embedding_parameters(spec) | encoder_end_parameters(spec) | head_parameters(spec)
    for index, layer in enumerate(spec.all_layers):
        yield *place_of_layer(spec, index), layer_parameters(spec, layer)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
