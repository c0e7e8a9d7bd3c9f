"""Operations on a fleet: Python values → request messages, response messages → progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias, TypedDict

from shardray.runtime.client.requests import set_field
from shardray.v1 import control_pb2

OperationResponse: TypeAlias = (
    control_pb2.ScaleResponse | control_pb2.ReloadResponse | control_pb2.RestartResponse | control_pb2.DrainResponse
)


class ShapeOptions(TypedDict, total=False):
    """Fields of ``ScaleRequest`` in control.proto; what is left out, or None, stays as it is."""

    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    replicas: int | None
    tensor_split: Sequence[float] | None
    stage_layers: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class Progress:
    """One step of an operation under way."""

    doing: str  # in a few words, numbers included
    fraction: float  # of the whole operation, in [0, 1]


def scale_request(change: ShapeOptions) -> control_pb2.ScaleRequest:
    """Raises ServerError (INVALID_ARGUMENT) for a value that no message can hold, TypeError for an unknown option."""
    request = control_pb2.ScaleRequest()
    for name, value in change.items():
        if name not in ShapeOptions.__annotations__:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(ShapeOptions.__annotations__)}")
        if value is not None:
            set_field(request, name, value)
    return request


def reload_request(source: str) -> control_pb2.ReloadRequest:
    request = control_pb2.ReloadRequest()
    set_field(request, "source", source)
    return request


def drain_request(timeout_s: float) -> control_pb2.DrainRequest:
    request = control_pb2.DrainRequest()
    set_field(request, "timeout_s", timeout_s)
    return request


def to_progress(response: OperationResponse) -> Progress:
    return Progress(response.progress.doing, response.progress.fraction)
