"""What the driver hears while replicas are placed, formed and watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardray.runtime.cluster.reports import RankFailure
from shardray.runtime.engine.assignment import ShardLoad


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
class ReplicaLost:
    """A replica's mesh is gone; it is formed again."""

    replica_id: int
    reason: str
    cause: RankFailure


@dataclass(frozen=True)
class RecoveryTimes:
    """Where the time of a recovery went: one part after the other."""

    noticed_s: float  # when the first sign of the loss was seen, in seconds since 1970
    fence_s: float  # until the ranks that are left had left the mesh, and those that hang were ended
    hosts_s: float  # until there was a host for every place; forms that failed are in here
    form_s: float  # until the groups of the new mesh were open
    load_s: float  # until the last of its ranks had its weights and pages
    attach_s: float  # until the driver was connected to it and had handed the requests over

    @property
    def recovery_s(self) -> float:
        return self.fence_s + self.hosts_s + self.form_s + self.load_s + self.attach_s

    def __str__(self) -> str:
        parts = ("fence", "hosts", "form", "load", "attach")
        return ", ".join(f"{part} {getattr(self, f'{part}_s'):.2f}" for part in parts)


@dataclass(frozen=True)
class ReplicaRecovered:
    """A replica runs again."""

    replica_id: int
    times: RecoveryTimes


@dataclass(frozen=True)
class ReplicaGaveUp:
    """A replica is not formed again any more."""

    replica_id: int
    reason: str


@dataclass(frozen=True)
class ShardMeasured:
    """One host of a running mesh told how it does."""

    replica_id: int
    rank: int
    load: ShardLoad


ClusterEvent = PlacementWaiting | ShardProgress | ReplicaLost | ReplicaRecovered | ReplicaGaveUp | ShardMeasured
EventSink = Callable[[ClusterEvent], None]  # called in the driver's event loop; must not block


def ignore_events(event: ClusterEvent) -> None:
    """A sink for those who do not watch."""


def load_sink(replica_id: int, events: EventSink) -> Callable[[int, ShardLoad], None]:
    """Takes (rank, load) of one replica."""
    return lambda rank, load: events(ShardMeasured(replica_id, rank, load))
