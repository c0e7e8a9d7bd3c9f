"""The watch over a running mesh: the first sign of trouble in, one clear reason and the usable hosts out.

The Ray call behind each host's ``run`` is the sentinel of its life: it ends when the process does, or when the rank
cannot go on. A slow heartbeat beside it finds hosts that hang while nobody waits for them. Nothing here is on the path
of a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from shardray.runtime.cluster.errors import ClusterError, HostDied, HostSilent
from shardray.runtime.cluster.form import FormedMesh, dissolve
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.reports import FailureKind, RankFailure, RunReport
from shardray.runtime.engine.assignment import ShardLoad

_SETTLE_S = 0.5  # after a rank lost a peer: for the peer's own end to show
_LEAVE_S = 2.0  # for a rank to leave its step when told to
_MAX_PULSE_INTERVAL_S = 10.0
_UNREACHED_S = 0.5  # before a host is asked again that cannot be reached
_CAUSES_FIRST = (FailureKind.DIED, FailureKind.RAISED, FailureKind.HUNG, FailureKind.LOST_PEER)


@dataclass(frozen=True)
class MeshFailure:
    """The end of a mesh."""

    reason: str  # one line about the cause
    failures: tuple[RankFailure, ...]  # the cause first
    survivors: tuple[RemoteHost, ...]  # unassigned again; all other hosts of the mesh are killed
    noticed_s: float  # when its first sign was seen, on the monotonic clock


class MeshWatch:
    """Starts ``run`` on every host of a mesh and watches until it ends. ``on_load`` hears how each rank does."""

    def __init__(
        self,
        mesh: FormedMesh,
        step_timeout_s: float,
        on_load: Callable[[int, ShardLoad], None] = lambda rank, load: None,
    ) -> None:
        self._mesh = mesh
        self._on_load = on_load
        self._silence_s = step_timeout_s
        self._stopping = False
        self._ending = asyncio.Lock()  # held by who ends it: a moment later its hosts may be in another mesh
        self._runs = [asyncio.create_task(host.run()) for host in mesh.hosts]
        self._pulses = [asyncio.create_task(self._pulse(rank, host)) for rank, host in enumerate(mesh.hosts)]

    @property
    def is_ending(self) -> bool:
        """Whether there are signs that the mesh has come to its end."""
        return any(task.done() for task in (*self._runs, *self._pulses))

    async def failure(self) -> MeshFailure | None:
        """Wait for the mesh's end. None if ``stop`` asked for it."""
        await asyncio.wait([*self._runs, *self._pulses], return_when=asyncio.FIRST_COMPLETED)
        noticed_s = time.monotonic()
        async with self._ending:
            return None if self._stopping else await self._end(noticed_s)

    async def stop(self, timeout_s: float) -> None:
        """End the mesh cleanly: its leader stops between two steps. Hosts that do not follow are left to the caller."""
        async with self._ending:
            self._stopping = True
            hosts = self._mesh.hosts
            await asyncio.gather(*(host.stop(timeout_s) for host in hosts), return_exceptions=True)
            await asyncio.wait([self._runs[0]], timeout=timeout_s)
            self._cancel()

    async def _end(self, noticed_s: float) -> MeshFailure:
        await self._settle()
        reported = self._ended()
        await self._tell_to_leave()
        hung = [rank for rank, run in enumerate(self._runs) if not run.done()]
        died = {rank: end for rank, end in self._ended().items() if end.kind is FailureKind.DIED}
        failures = self._order({**reported, **died}, hung)
        survivors = await self._dissolve({*hung, *died})
        self._cancel()
        return MeshFailure("; ".join(_causes(failures)), tuple(failures), tuple(survivors), noticed_s)

    async def _pulse(self, rank: int, host: RemoteHost) -> None:
        """Ends when the host has died, or has not answered for as long as a rank may stay away from a step."""
        heard_s = time.monotonic()
        while True:
            try:
                told = await host.progress(self._silence_s)
            except HostSilent:
                if time.monotonic() - heard_s >= self._silence_s:
                    return
                await asyncio.sleep(_UNREACHED_S)
                continue
            except ClusterError:
                return
            heard_s = time.monotonic()
            if told.load is not None:
                self._on_load(rank, told.load)
            await asyncio.sleep(min(self._silence_s / 2, _MAX_PULSE_INTERVAL_S))

    async def _settle(self) -> None:
        """Give the cause a moment to show itself, unless it is plain already."""
        deadline = time.monotonic() + _SETTLE_S
        while any(not run.done() for run in self._runs) and (left_s := deadline - time.monotonic()) > 0:
            if any(end.kind in (FailureKind.DIED, FailureKind.RAISED) for end in self._ended().values()):
                return
            running = [run for run in self._runs if not run.done()]
            await asyncio.wait(running, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    async def _tell_to_leave(self) -> None:
        """Abort every rank that still runs; whoever is able to leave has left afterwards."""
        running = [rank for rank, run in enumerate(self._runs) if not run.done()]
        if running:
            aborts = [asyncio.create_task(self._mesh.hosts[rank].abort(_LEAVE_S)) for rank in running]
            await asyncio.wait([self._runs[rank] for rank in running], timeout=_LEAVE_S)
            await asyncio.gather(*aborts, return_exceptions=True)

    async def _dissolve(self, lost: set[int]) -> list[RemoteHost]:
        hosts = self._mesh.hosts
        await asyncio.gather(*(hosts[rank].kill() for rank in lost))
        return await dissolve([host for rank, host in enumerate(hosts) if rank not in lost])

    def _ended(self) -> dict[int, RankFailure]:
        return {
            rank: self._end_of(rank, run) for rank, run in enumerate(self._runs) if run.done() and not run.cancelled()
        }

    def _end_of(self, rank: int, run: asyncio.Task[RunReport]) -> RankFailure:
        error = run.exception()
        if isinstance(error, HostDied):
            return self._describe(rank, FailureKind.DIED, str(error).partition(" died: ")[2])
        if error is not None:
            return self._describe(rank, FailureKind.RAISED, str(error))
        return run.result().failure or self._describe(rank, FailureKind.LOST_PEER, "its run ended unasked")

    def _order(self, ended: dict[int, RankFailure], hung: list[int]) -> list[RankFailure]:
        """All failures, causes first; a cause that cannot speak for itself gets step and collective from who waited."""
        witness = next((end for end in ended.values() if end.step is not None), None)
        failures = list(ended.values())
        for rank in hung:
            cause = f"it does not leave its step; {witness.cause}" if witness else "it does not answer"
            failures.append(self._describe(rank, FailureKind.HUNG, cause))
        if witness is not None:
            failures = [_with_where(failure, witness) for failure in failures]
        return sorted(failures, key=lambda failure: _CAUSES_FIRST.index(failure.kind))

    def _describe(self, rank: int, kind: FailureKind, cause: str) -> RankFailure:
        info, tp_size = self._mesh.hosts[rank].info, self._mesh.tp_size
        return RankFailure(
            rank=rank,
            stage=rank // tp_size,
            tp_rank=rank % tp_size,
            host=info.host,
            pid=info.pid,
            kind=kind,
            cause=cause,
        )

    def _cancel(self) -> None:
        for task in (*self._runs, *self._pulses):
            task.cancel()


def _with_where(failure: RankFailure, witness: RankFailure) -> RankFailure:
    if failure.step is not None:
        return failure
    return msgspec.structs.replace(failure, step=witness.step, collective=witness.collective)


def _causes(failures: list[RankFailure]) -> list[str]:
    return [str(failure) for failure in failures if failure.kind == failures[0].kind]
