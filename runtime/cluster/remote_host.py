"""A host as the driver sees it: awaitable calls with deadlines, and plain errors in place of Ray's."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.errors import ClusterError, HostDied, HostSilent
from shardray.runtime.cluster.host import HostActor
from shardray.runtime.cluster.lease import HOST_NAME, host_names
from shardray.runtime.cluster.placement import HostsNeed
from shardray.runtime.cluster.ray_call import in_one_line, in_ray
from shardray.runtime.cluster.reports import FormReport, HostInfo, HostProgress, HostState, RunReport, SpanReport
from shardray.runtime.engine.assignment import ShardAssignment

_log = logging.getLogger(__name__)
_ANSWER_TIMEOUT_S = 10.0
_SENTINEL_S = 30.0
_UNREACHED_S = 0.1  # before it is asked again


class RemoteHost:
    """A started host; ``info`` is what it told about itself. Every call raises HostDied or HostSilent."""

    def __init__(self, actor: Any, info: HostInfo) -> None:
        self._actor = actor
        self.info = info

    async def progress(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> HostProgress:
        frame = await self._ask("progress", self._actor.progress.remote(), timeout_s)
        return msgspec.msgpack.decode(frame, type=HostProgress)

    async def prepare(
        self, num_threads: int, model_dir: str, dtype: str, tls: TlsFiles | None, timeout_s: float
    ) -> None:
        call = self._actor.prepare.remote(num_threads, model_dir, dtype, msgspec.msgpack.encode(tls))
        await self._ask("prepare", call, timeout_s)

    async def open_rendezvous(
        self, bind_host: str, credentials: Credentials, size: int, timeout_s: float
    ) -> tuple[str, int]:
        call = self._actor.open_rendezvous.remote(bind_host, msgspec.msgpack.encode(credentials), size)
        host, port = await self._ask("open_rendezvous", call, timeout_s)
        return host, port

    async def form(self, assignment: ShardAssignment, purpose: str, source: str, revision: str | None) -> FormReport:
        """Has no deadline of its own: who waits for it also watches ``progress``."""
        frame = msgspec.msgpack.encode(assignment)
        report = await self._ask("form", self._actor.form.remote(frame, purpose, source, revision), None)
        return msgspec.msgpack.decode(report, type=FormReport)

    async def run(self) -> RunReport:
        """Start the shard, if it does not run yet; ends when its part of the mesh does: the sentinel of its life.

        It says nothing of a host that cannot be reached: to ask for ``progress`` tells.
        """
        await self._ask("start", self._actor.start.remote(), None)
        report = None
        while report is None:  # asked again now and then: a driver that is gone must not leave its question behind
            try:
                report = await self._ask("await_end", self._actor.await_end.remote(_SENTINEL_S), None)
            except HostSilent:
                await asyncio.sleep(_UNREACHED_S)
        return msgspec.msgpack.decode(report, type=RunReport)

    async def state(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> HostState:
        return msgspec.msgpack.decode(await self._ask("state", self._actor.state.remote(), timeout_s), type=HostState)

    async def renew(self, owner: str, lease_s: float, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
        return bool(await self._ask("renew", self._actor.renew.remote(owner, lease_s), timeout_s))

    async def clock(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> int:
        return int(await self._ask("clock", self._actor.clock.remote(), timeout_s))

    async def start_trace(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        await self._ask("start_trace", self._actor.start_trace.remote(), timeout_s)

    async def stop_trace(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> SpanReport:
        report = await self._ask("stop_trace", self._actor.stop_trace.remote(), timeout_s)
        return msgspec.msgpack.decode(report, type=SpanReport)

    async def stop(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        await self._ask("stop", self._actor.stop.remote(), timeout_s)

    async def abort(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        await self._ask("abort", self._actor.abort.remote(), timeout_s)

    async def release(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        await self._ask("release", self._actor.release.remote(), timeout_s)

    async def kill(self) -> None:
        """End the host's process, whatever it is doing; a host that is dead already is fine."""
        try:
            await in_ray(ray.kill, self._actor)
        except ClusterError as error:  # the cluster itself is gone
            _log.warning("%s could not be told to end: %s", self.info, error)

    async def _ask(self, what: str, ref: Any, timeout_s: float | None) -> Any:
        return await _answer(ref, timeout_s, f"{self.info} did not answer {what}", str(self.info))


async def start_host(
    group: PlacementGroup, group_name: str, bundle: int, need: HostsNeed, timeout_s: float
) -> RemoteHost:
    """Start a host in one bundle. Raises HostDied or HostSilent, naming the bundle."""
    options = HostActor.options(
        name=f"{HOST_NAME}{uuid.uuid4().hex}",
        num_cpus=need.cpus_per_host,
        num_gpus=need.gpus_per_host,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    )
    actor = await in_ray(options.remote, group_name, bundle)
    return await _meet(actor, f"the host of bundle {bundle}", timeout_s)


async def find_hosts(timeout_s: float) -> list[RemoteHost]:
    """The hosts of this Ray namespace that answer; the others are ended."""
    names = await in_ray(host_names)

    async def find(name: str) -> RemoteHost | None:
        try:
            return await _meet(await in_ray(ray.get_actor, name), "a host", timeout_s)
        except ClusterError:  # it has died since it was listed, or it does not answer
            return None

    return [host for host in await asyncio.gather(*map(find, names)) if host is not None]


async def _meet(actor: Any, name: str, timeout_s: float) -> RemoteHost:
    try:
        frame = await _answer(actor.describe.remote(), timeout_s, f"{name} has not started", name)
    except BaseException:
        await in_ray(ray.kill, actor)
        raise
    return RemoteHost(actor, msgspec.msgpack.decode(frame, type=HostInfo))


async def _answer(ref: Any, timeout_s: float | None, silence: str, name: str) -> Any:
    """The result of a Ray call, awaited without blocking the loop."""
    future = asyncio.wrap_future(ref.future())
    future.add_done_callback(_take)
    # Not wait_for: that would cancel Ray's future, which Ray then still completes.
    done, _ = await asyncio.wait({future}, timeout=timeout_s)
    if not done:
        raise HostSilent(f"{silence} within {timeout_s:g} s")
    try:
        return future.result()
    except ActorUnavailableError as error:
        raise HostSilent(f"{name} cannot be reached") from error
    except RayActorError as error:
        raise HostDied(f"{name} died: {_plain_cause(error)}") from error
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise ClusterError(f"{name}: {in_one_line(cause)}") from error


def _take(future: asyncio.Future[Any]) -> None:
    """Look at a late error that nobody waits for any longer, so that asyncio does not complain about it."""
    if not future.cancelled():
        future.exception()


def _plain_cause(error: RayActorError) -> str:
    """Ray's paragraph about a death in a few words."""
    text = " ".join(str(error).split())
    if "node has died" in text or "its node" in text:
        return "its node is gone"
    if "killed by `ray.kill`" in text:
        return "it was killed by the fleet"
    if "creation task" in text:
        return f"it did not start: {text[-300:]}"
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    if detail is None:
        return text[:300]
    if "connection error" in detail[1]:
        return "its process ended without a word (killed, crashed, or out of memory)"
    return f"its process ended ({detail[1].rstrip('.')})"
