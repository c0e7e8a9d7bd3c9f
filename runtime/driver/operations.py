"""What an operator can ask of a running fleet, and what comes back while it is done."""

from __future__ import annotations

import enum
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from shardray.runtime.cluster.trace import RankTrace


@dataclass(frozen=True)
class ShapeChange:
    """New counts; None leaves one as it is.

    A new tensor size drops ``tensor_split``, a new stage count ``stage_layers``, unless they are given as well.
    """

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    replicas: int | None = None
    tensor_split: tuple[float, ...] | None = None
    stage_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OperationProgress:
    """One step of an operation under way."""

    doing: str  # in a few words, numbers included
    fraction: float  # of the whole operation, in [0, 1]


class OperationKind(enum.StrEnum):
    """What can be asked of a fleet."""

    SCALE = "scale"
    RELOAD = "reload"
    RESTART = "restart"
    DRAIN = "drain"


@dataclass(frozen=True)
class OperationStatus:
    """An operation under way, at one moment."""

    kind: OperationKind
    progress: OperationProgress
    start_time_s: float = field(default_factory=time.time)  # in seconds since 1970


class OperationError(Exception):
    """Base of the errors below; the message is one line for the operator."""


class OperationConflictError(OperationError):
    """Another operation is under way; nothing was touched."""


class OperationRefusedError(OperationError):
    """It cannot be done, for the reason given with numbers; nothing was touched."""


class OperationFailedError(OperationError):
    """It failed half-way; the fleet is what it was before, and every request lives."""


class FleetOperator(Protocol):
    """Changes the fleet while clients stream. One operation at a time.

    Each iterator ends when the operation is done, and raises OperationError. An operation goes on when nobody iterates
    any longer.
    """

    def scale(self, change: ShapeChange) -> AsyncIterator[OperationProgress]:
        """Run in another shape, or on another number of replicas."""

    def reload(self, source: str) -> AsyncIterator[OperationProgress]:
        """Serve the weights of ``source`` (as model.source) instead, replica by replica."""

    def restart(self) -> AsyncIterator[OperationProgress]:
        """Replace every host by a new process, replica by replica."""

    def drain(self, timeout_s: float) -> AsyncIterator[OperationProgress]:
        """Take no new requests, let those in flight end for ``timeout_s`` seconds, then stop the server."""

    async def trace(self, seconds: float) -> list[RankTrace]:
        """What every rank of every replica does for ``seconds``. Changes nothing, and runs beside an operation."""
