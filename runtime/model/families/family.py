"""What a family is: how its ``config.json`` is read, and where its checkpoints keep each parameter."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a parameter. ``{layer}`` in the name stands for the layer's index.

    ``transposed``: stored as (in, out). ``start``: the first row (of the untransposed matrix) inside a fused tensor.
    """

    name: str
    transposed: bool = False
    start: int = 0


@dataclass(frozen=True)
class Family:
    """``sources`` maps the names of runtime/model/parameters.py; tensors matching ``ignored`` are not parameters."""

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], DecoderSpec]
    sources: Callable[[DecoderSpec], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)  # what checkpoints of this family put before every name


def required(config: Mapping[str, Any], field: str, kind: type[T]) -> T:
    """A field that the config must have; a number has to be positive. Raises ModelConfigError naming it."""
    value = config.get(field)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected {kind.__name__}")
    if isinstance(value, (int, float)) and kind is not bool and value <= 0:
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected a positive {kind.__name__}")
    return value


def optional(config: Mapping[str, Any], field: str, default: T) -> T:
    """A field of the type of its default, which stands for an absent or null one. Raises ModelConfigError naming it."""
    return default if config.get(field) is None else required(config, field, type(default))


def choice(config: Mapping[str, Any], field: str, default: str, accepted: Mapping[str, T]) -> T:
    """One of the accepted values of a field. Raises ModelConfigError listing them."""
    value = config.get(field) or default
    if not isinstance(value, str) or value not in accepted:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported; {nearest_of(value, accepted)}")
    return accepted[value]


def nearest_of(value: object, accepted: Iterable[str]) -> str:
    """What to try instead of ``value``."""
    nearest = difflib.get_close_matches(str(value), accepted, n=1, cutoff=0.0)[0]
    return f"the nearest is {nearest!r} (supported: {', '.join(sorted(accepted))})"


def refuse_unless(config: Mapping[str, Any], field: str, expected: Any) -> None:
    """Refuse a field whose other values would change the output."""
    value = config.get(field)
    if value is not None and value != expected:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported (only {expected!r} is)")


def whole_parts(config: Mapping[str, Any], field: str, parts_field: str) -> int:
    """``config[field] / config[parts_field]``, which has to come out even. Raises ModelConfigError."""
    whole, parts = required(config, field, int), required(config, parts_field, int)
    if whole % parts:
        raise ModelConfigError(f"config.json: {field} {whole} is not a multiple of {parts_field} {parts}")
    return whole // parts
