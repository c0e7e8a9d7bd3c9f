"""What a family is: how its ``config.json`` is read, and where its checkpoints keep each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A field that the config must have. Raises ModelConfigError naming it."""
    value = config.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelConfigError(f"config.json: {field} is {value!r}, expected {kind.__name__}")
    return value


def choice(config: Mapping[str, Any], field: str, default: str, accepted: Mapping[str, T]) -> T:
    """One of the accepted values of a field. Raises ModelConfigError listing them."""
    value = config.get(field, default)
    if value not in accepted:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported (supported: {', '.join(accepted)})")
    return accepted[value]


def refuse_unless(config: Mapping[str, Any], field: str, expected: Any) -> None:
    """Refuse a field whose other values would change the output."""
    value = config.get(field, expected)
    if value != expected:
        raise ModelConfigError(f"config.json: {field} {value!r} is not supported (only {expected!r} is)")
