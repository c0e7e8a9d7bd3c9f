"""What hosts tell the driver, as plain data (MessagePack on the wire, never pickled objects of ours)."""

from __future__ import annotations

import enum

import msgspec

from shardray.parallel.spans import Span
from shardray.runtime.engine.assignment import ShardAssignment, ShardInfo, ShardLoad


class HostInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a host learned about itself when it started."""

    node_id: str
    host: str  # IP address of its node
    pid: int
    device: str  # "cpu" or "cuda:0": a host sees its own GPU only
    gpu_ids: tuple[str, ...] = ()  # as its node counts them
    cpu_ids: tuple[int, ...]  # cores it may run on
    group: str  # name of the placement group that it sits in
    bundle: int  # of that group

    def __str__(self) -> str:
        return f"host {self.host} pid {self.pid}"


class HostProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What a host is doing. An answer also says that it is not hung."""

    doing: str
    fraction: float  # of it, 0 to 1
    load: ShardLoad | None = None  # None: no shard is formed


class FailureKind(enum.StrEnum):
    """How a rank came to an end."""

    DIED = "died"  # its process or its node is gone
    HUNG = "hung"  # it does not answer, or does not leave its step
    RAISED = "raised"  # an error of its own
    LOST_PEER = "lost peer"  # another rank did not keep up; a consequence, seldom the cause


class RankFailure(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's end: who, where, when, and why."""

    rank: int
    stage: int
    tp_rank: int
    host: str
    pid: int
    kind: FailureKind
    cause: str
    step: int | None = None
    collective: str | None = None  # what it waited in

    @property
    def place(self) -> str:
        return place_text(self.stage, self.tp_rank, self.host, self.pid)

    def __str__(self) -> str:
        when = f" at step {self.step}" if self.step is not None else ""
        where = f" in {self.collective}" if self.collective and self.collective not in self.cause else ""
        return f"{self.place} {self.kind}{when}{where}: {self.cause}"


def place_text(stage: int, tp_rank: int, host: str, pid: int) -> str:
    return f"stage {stage} tensor rank {tp_rank} (host {host} pid {pid})"


class FormReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one host's form: a shard (and the leader's port), or a failure."""

    shard: ShardInfo | None = None
    port: int | None = None  # of the leader's server; None on other ranks
    load_s: float = 0.0  # of the form, after the groups were open
    failure: RankFailure | None = None


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """What a host holds: all that a driver needs that has not formed it itself."""

    assignment: ShardAssignment | None = None  # None: no place in a mesh
    purpose: str = ""  # of the recipe that it was formed for
    shard: ShardInfo | None = None  # None: not formed yet
    port: int | None = None  # of the leader's server
    runs: bool = False


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one host's run; ``failure`` is None after a clean stop."""

    failure: RankFailure | None = None


class SpanReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank did while a trace was on."""

    spans: list[Span] = []
    num_dropped: int = 0  # that came when there were too many
