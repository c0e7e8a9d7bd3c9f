"""A trace of running meshes: every host writes down what it does for some seconds; their clocks are told apart.

Processes of one machine share CLOCK_MONOTONIC. Between machines its difference is estimated from the quickest of some
questions (Cristian, "Probabilistic clock synchronization", 1989): an answer was given in the middle of its round trip,
give or take half of that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec

from shardray.parallel.spans import Span
from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.form import FormedMesh
from shardray.runtime.cluster.remote_host import RemoteHost

_log = logging.getLogger(__name__)
_NUM_QUESTIONS = 8


class RankTrace(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's spans, on the clock of the first rank of all."""

    replica_id: int
    rank: int
    stage: int
    tp_rank: int
    host: str
    pid: int
    spans: list[Span]
    num_dropped: int = 0
    clock_error_ns: int = 0  # by how much its clock may be off; 0 on the first rank's machine


class _Offset(msgspec.Struct, frozen=True):
    """A machine's clock less that of this process."""

    offset_ns: int
    error_ns: int


async def trace_meshes(meshes: Sequence[tuple[int, FormedMesh]], seconds: float) -> list[RankTrace]:
    """What every rank of (replica id, mesh) did for ``seconds``. Ranks that do not answer are left out, and logged."""
    places = [(replica_id, mesh, rank) for replica_id, mesh in meshes for rank in range(len(mesh.hosts))]
    hosts = [mesh.hosts[rank] for _, mesh, rank in places]
    offsets = await _offsets(hosts)
    try:
        await asyncio.gather(*(host.start_trace() for host in hosts), return_exceptions=True)
        await asyncio.sleep(seconds)
    finally:
        reports = await asyncio.gather(*(host.stop_trace() for host in hosts), return_exceptions=True)
    first = offsets.get(hosts[0].info.node_id)
    found = []
    for (replica_id, mesh, rank), host, report in zip(places, hosts, reports, strict=True):
        own = offsets.get(host.info.node_id)
        if isinstance(report, BaseException) or own is None or first is None:
            _log.warning("no trace of %s: %s", host.info, report)
            continue
        shift_ns, is_first = own.offset_ns - first.offset_ns, own is first
        found.append(
            RankTrace(
                replica_id=replica_id,
                rank=rank,
                stage=rank // mesh.tp_size,
                tp_rank=rank % mesh.tp_size,
                host=host.info.host,
                pid=host.info.pid,
                spans=[Span(span.kind, span.name, span.begin_ns - shift_ns, span.duration_ns) for span in report.spans],
                num_dropped=report.num_dropped,
                clock_error_ns=0 if is_first else own.error_ns + first.error_ns,
            )
        )
    return found


async def _offsets(hosts: Sequence[RemoteHost]) -> dict[str, _Offset]:
    """By node id; nodes none of whose hosts answers are left out."""
    one_a_node = {host.info.node_id: host for host in hosts}
    found: dict[str, _Offset] = {}
    for node_id, host in one_a_node.items():
        try:
            asked = [await _ask_clock(host) for _ in range(_NUM_QUESTIONS)]
        except ClusterError as error:
            _log.warning("%s does not tell its clock: %s", host.info, error)
            continue
        found[node_id] = min(asked, key=lambda offset: offset.error_ns)
    return found


async def _ask_clock(host: RemoteHost) -> _Offset:
    asked_ns = time.monotonic_ns()
    told_ns = await host.clock()
    answered_ns = time.monotonic_ns()
    return _Offset(told_ns - (asked_ns + answered_ns) // 2, (answered_ns - asked_ns) // 2)
