"""What the driver hears while replicas are placed, formed and watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardray.runtime.cluster.reports import RankFailure


@dataclass(frozen=True)
class PlacementWaiting:
    """A replica's hosts have no room yet."""

    replica_id: int
    reason: str
    remaining_s: float


@dataclass(frozen=True)
class ShardProgress:
    """One host went on with its form."""

    replica_id: int
    rank: int
    host: str
    pid: int
    doing: str  # "loading weights"
    fraction: float  # of ``doing``, 0 to 1


@dataclass(frozen=True)
class ReplicaFormed:
    """A replica is ready for requests."""

    replica_id: int


@dataclass(frozen=True)
class ReplicaLost:
    """A replica's mesh is gone; it is formed again."""

    replica_id: int
    reason: str
    cause: RankFailure


@dataclass(frozen=True)
class ReplicaRecovered:
    """A replica runs again."""

    replica_id: int
    recovery_s: float  # since its loss was found


@dataclass(frozen=True)
class ReplicaGaveUp:
    """A replica is not formed again any more."""

    replica_id: int
    reason: str


ClusterEvent = PlacementWaiting | ShardProgress | ReplicaFormed | ReplicaLost | ReplicaRecovered | ReplicaGaveUp
EventSink = Callable[[ClusterEvent], None]  # called in the driver's event loop; must not block


def ignore_events(event: ClusterEvent) -> None:
    """A sink for those who do not watch."""
