"""What is asked of the fleet's operator, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from shardray.runtime.driver.operations import ShapeChange
from shardray.runtime.engine.request import FieldError
from shardray.v1 import control_pb2

_MAX_COUNT = 1024  # of ranks, stages or replicas; a larger number is a slip of the hand
_MAX_LAYERS = 65_536  # of one stage
_MAX_SOURCE_LEN = 4096
_MAX_DRAIN_S = 86_400.0
_DEFAULT_DRAIN_S = 60.0


def check_scale(request: control_pb2.ScaleRequest) -> ShapeChange:
    """Raises FieldError. Whether the fleet has room for it is for the operator to say."""
    change = ShapeChange(
        tensor_parallel_size=_count(request, "tensor_parallel_size"),
        pipeline_parallel_size=_count(request, "pipeline_parallel_size"),
        replicas=_count(request, "replicas"),
        tensor_split=tuple(request.tensor_split) or None,
        stage_layers=tuple(request.stage_layers) or None,
    )
    if change == ShapeChange():
        raise FieldError("replicas", "nothing to change; set it, tensor_parallel_size or pipeline_parallel_size")
    _check_entries("tensor_split", request.tensor_split, change.tensor_parallel_size, math.inf)
    _check_entries("stage_layers", request.stage_layers, change.pipeline_parallel_size, _MAX_LAYERS)
    return change


def check_source(source: str) -> str:
    """The source itself. Raises FieldError."""
    if not source.strip():
        raise FieldError("source", "is empty; give a known name, a hub id, a folder or a .gguf file")
    if len(source) > _MAX_SOURCE_LEN or not source.isprintable():
        raise FieldError("source", f"give at most {_MAX_SOURCE_LEN} printable characters")
    return source


def check_drain_timeout(request: control_pb2.DrainRequest) -> float:
    """Seconds. Raises FieldError."""
    timeout_s = request.timeout_s if request.HasField("timeout_s") else _DEFAULT_DRAIN_S
    if not 0 <= timeout_s <= _MAX_DRAIN_S:  # false for NaN too
        raise FieldError("timeout_s", f"{timeout_s:g} is outside [0, {_MAX_DRAIN_S:g}]")
    return timeout_s


def _count(
    request: control_pb2.ScaleRequest, name: Literal["tensor_parallel_size", "pipeline_parallel_size", "replicas"]
) -> int | None:
    if not request.HasField(name):
        return None
    count: int = getattr(request, name)
    if not 1 <= count <= _MAX_COUNT:
        raise FieldError(name, f"{count} is outside [1, {_MAX_COUNT}]")
    return count


def _check_entries(name: str, entries: Iterable[float], count: int | None, largest: float) -> None:
    values = list(entries)
    if len(values) > _MAX_COUNT or (values and count is not None and len(values) != count):
        raise FieldError(name, f"has {len(values)} entries, give {count or f'at most {_MAX_COUNT}'}")
    for index, value in enumerate(values):
        if not (0 < value <= largest and math.isfinite(value)):
            upper = "" if math.isinf(largest) else f" and at most {largest:g}"
            raise FieldError(f"{name}[{index}]", f"{value:g} is not accepted; give a number above 0{upper}")
