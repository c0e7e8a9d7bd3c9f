"""The host: a Ray actor with one device, light until it is given a place in a mesh, and free to be given another.

    unassigned --form--> formed --start--> running --> ended --release--> unassigned

``form``, ``start`` and ``release`` go one after the other; ``progress``, ``stop``, ``abort`` and ``await_end`` work at
any time beside them. torch is imported by ``prepare``. Arguments and results are MessagePack or builtins. A host
belongs to the driver that renews its lease, outlives it by that lease, and can be claimed by the next one meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.first_import import load_runtime
from shardray.runtime.cluster.lease import Lease
from shardray.runtime.cluster.reports import (
    FailureKind,
    FormReport,
    HostInfo,
    HostProgress,
    HostState,
    RankFailure,
    RunReport,
    SpanReport,
)
from shardray.runtime.engine.assignment import ShardAssignment

if TYPE_CHECKING:
    from shardray.runtime.cluster.leader import LeaderServer
    from shardray.runtime.engine.shard import Rendezvous, Shard

_log = logging.getLogger(__name__)
_STOPPED = "the replica was stopped"


class Host:
    """One device's owner. See ``RemoteHost`` for the same methods as seen from the driver."""

    def __init__(self, group: str, bundle: int) -> None:
        self._group = group
        self._bundle = bundle
        self._cpu_ids = tuple(sorted(os.sched_getaffinity(0)))  # before any form pins this process
        self._progress: tuple[str, float] = ("waiting for a place", 0.0)
        self._joined_s = 0.0  # when the groups of the mesh were open
        self._assignment: ShardAssignment | None = None
        self._purpose = ""
        self._rendezvous: Rendezvous | None = None
        self._shard: Shard | None = None
        self._server: LeaderServer | None = None
        self._port: int | None = None
        self._leaving = False  # asked to stop: the end of run is no failure
        self._runner: threading.Thread | None = None
        self._ended = threading.Event()
        self._end = RunReport()
        self._lease = Lease()

    @ray.method(concurrency_group="control")
    def describe(self) -> bytes:
        """The host's HostInfo."""
        info = HostInfo(
            node_id=ray.get_runtime_context().get_node_id(),
            group=self._group,
            bundle=self._bundle,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            pid=os.getpid(),
            device=_device(),
            gpu_ids=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            cpu_ids=self._cpu_ids,
        )
        return msgspec.msgpack.encode(info)

    @ray.method(concurrency_group="control")
    def progress(self) -> bytes:
        """The host's HostProgress. An answer also says that the host is not hung."""
        doing, fraction = self._progress
        load = None if (shard := self._shard) is None else shard.load()
        return msgspec.msgpack.encode(HostProgress(doing=doing, fraction=fraction, load=load))

    def prepare(self, num_threads: int, model_dir: str, dtype: str, tls: bytes) -> None:
        """Import the runtime and load its kernels: the slow part of a form that needs no place yet.

        Raises TlsError if ``tls`` (TlsFiles or null) cannot be used on this node.
        """
        if (files := msgspec.msgpack.decode(tls, type=TlsFiles | None)) is not None:
            files.check()
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read once, when torch is imported
        self._note("importing the runtime", 0.0)
        load_runtime(model_dir, dtype, _device(), num_threads)
        self._note("waiting for a place", 0.0)

    def open_rendezvous(self, bind_host: str, credentials: bytes, size: int) -> tuple[str, int]:
        """Open the table through which the ranks of the next mesh find each other. Called on the leader-to-be."""
        from shardray.runtime.engine.shard import open_rendezvous

        self._rendezvous = open_rendezvous(bind_host, msgspec.msgpack.decode(credentials, type=Credentials), size)
        return self._rendezvous.host, self._rendezvous.port

    def form(self, assignment: bytes, purpose: str, source: str, revision: str | None) -> bytes:
        """Take the place that ``assignment`` (a ShardAssignment) names; a FormReport comes back, whatever happens.

        Where its ``model_dir`` does not exist on this machine, the model is resolved from ``source``. By ``purpose`` a
        driver that was not there knows what the mesh is for.
        """
        place = msgspec.msgpack.decode(assignment, type=ShardAssignment)
        self._assignment, self._purpose = place, purpose
        try:
            report = self._take_place(_with_local_model(place, source, revision, self._note))
        except Exception as error:  # the boundary to the driver: every failure leaves as data
            _log.exception("forming rank %d failed", place.rank)
            report = FormReport(failure=_failure_of(error, place))
        return msgspec.msgpack.encode(report)

    def start(self) -> None:
        """Run the shard in a thread of its own until the mesh ends. Does nothing if it runs already."""
        if self._shard is None or self._assignment is None:
            raise RuntimeError("start: this host has no place in a mesh; form it first")
        if self._runner is None:
            self._progress = ("running", 1.0)
            self._runner = threading.Thread(target=self._run, name="shard", args=(self._shard, self._assignment))
            self._runner.start()

    @ray.method(concurrency_group="sentinel")
    def await_end(self, timeout_s: float) -> bytes | None:
        """The RunReport of what ``start`` began, whatever happened; None if it still runs after ``timeout_s``."""
        return msgspec.msgpack.encode(self._end) if self._ended.wait(timeout_s) else None

    @ray.method(concurrency_group="control")
    def state(self) -> bytes:
        """The host's HostState."""
        runs = self._runner is not None and not self._ended.is_set()
        shard = None if self._shard is None else self._shard.info
        state = HostState(assignment=self._assignment, purpose=self._purpose, shard=shard, port=self._port, runs=runs)
        return msgspec.msgpack.encode(state)

    @ray.method(concurrency_group="control")
    def renew(self, owner: str, lease_s: float) -> bool:
        """Stay alive for ``lease_s`` more seconds, as the host of ``owner``; False if another driver's it is."""
        return self._lease.renew(owner, lease_s)

    @ray.method(concurrency_group="control")
    def renewed_s_ago(self) -> float:
        """Seconds since a driver renewed the lease: what another host asks whose own is over."""
        return self._lease.renewed_s_ago

    @ray.method(concurrency_group="control")
    def clock(self) -> int:
        """This machine's CLOCK_MONOTONIC, in ns: what spans are written down by."""
        return time.monotonic_ns()

    @ray.method(concurrency_group="control")
    def start_trace(self) -> None:
        """Write down what every step does from now on. Does nothing without a place in a mesh."""
        if self._shard is not None:
            self._shard.start_trace()

    @ray.method(concurrency_group="control")
    def stop_trace(self) -> bytes:
        """The SpanReport of what was written down."""
        spans = None if self._shard is None else self._shard.stop_trace()
        report = SpanReport() if spans is None else SpanReport(spans=spans.found, num_dropped=spans.num_dropped)
        return msgspec.msgpack.encode(report)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End a leader's run cleanly, between two steps; the other ranks follow when it closes its links."""
        self._leaving = True
        if self._server is not None and self._shard is not None:
            self._shard.engine.stop()

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Break off whatever the shard is blocked in, so that its run or its form returns soon."""
        if self._shard is not None:
            self._shard.abort()
        elif self._rendezvous is not None:
            self._rendezvous.abort()

    def release(self) -> None:
        """Give up the place: memory, groups and ports are free afterwards, and the host can be formed again."""
        if self._server is not None:
            self._server.stop(_STOPPED)
        if self._runner is not None:
            self._runner.join()
        if self._shard is not None:
            self._shard.close()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._server = self._shard = self._rendezvous = self._assignment = self._port = self._runner = None
        self._leaving = False
        self._ended.clear()
        self._progress = ("waiting for a place", 0.0)

    def _run(self, shard: Shard, place: ShardAssignment) -> None:
        failure = None
        try:
            if self._server is not None:
                shard.engine.run(self._server.publish)
            else:
                shard.serve()
        except Exception as error:  # the boundary to the driver: every failure leaves as data
            if not self._leaving:
                _log.exception("rank %d failed", place.rank)
                failure = _failure_of(error, place)
        if self._server is not None:
            self._server.stop(_STOPPED if failure is None else str(failure))
        self._end = RunReport(failure=failure)
        self._ended.set()

    def _take_place(self, place: ShardAssignment) -> FormReport:
        from shardray.runtime.engine.shard import form_shard

        shard = form_shard(place, self._note, self._rendezvous)
        self._shard = shard
        if place.rank == 0:
            from shardray.runtime.cluster.leader import LeaderServer

            self._server = LeaderServer()
            self._port = self._server.start(place.bind_host, shard.engine, place.credentials)
        self._note("formed", 1.0)
        return FormReport(shard=shard.info, port=self._port, load_s=time.monotonic() - self._joined_s)

    def _note(self, doing: str, fraction: float) -> None:
        if doing == "loading" and self._progress[0] != doing:
            self._joined_s = time.monotonic()
        self._progress = (doing, fraction)


def _device() -> str:
    return "cuda:0" if ray.get_gpu_ids() else "cpu"  # Ray hides all other GPUs from this process


def _with_local_model(
    place: ShardAssignment, source: str, revision: str | None, note: Callable[[str, float], None]
) -> ShardAssignment:
    if Path(place.model_dir).exists():
        return place
    from shardray.runtime.model.sources import resolve_model

    def progress(description: str, done: int, total: int | None) -> None:
        note(f"{description}, {done} done" if total is None else description, done / total if total else 0.0)

    note(f"fetching {source}", 0.0)
    return msgspec.structs.replace(place, model_dir=str(resolve_model(source, revision=revision, progress=progress)))


def _failure_of(error: Exception, place: ShardAssignment) -> RankFailure:
    """``error`` as plain data, with what the engine and the mesh say about it."""
    from shardray.parallel.errors import MeshError

    return RankFailure(
        rank=place.rank,
        stage=place.rank // place.tp_size,
        tp_rank=place.rank % place.tp_size,
        host=place.bind_host,
        pid=os.getpid(),
        kind=FailureKind.LOST_PEER if isinstance(error, MeshError) else FailureKind.RAISED,
        cause=" ".join(str(error).split()) or type(error).__name__,
        step=getattr(error, "step", None),
        collective=getattr(error, "operation", None),
    )


_CONCURRENCY = {"control": 4, "sentinel": 4}
# A host that dies is replaced, never restarted: its place in the old mesh is gone. It does outlive its driver.
_OPTIONS: dict[str, Any] = {
    "max_restarts": 0, "max_task_retries": 0, "lifetime": "detached", "concurrency_groups": _CONCURRENCY,
}  # fmt: skip
HostActor: Any = ray.remote(**_OPTIONS)(Host)
