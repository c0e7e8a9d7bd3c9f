"""Form: live hosts in, a mesh out. The one operation behind start, heal and scale.

Each host gets its place, the leader opens the rendezvous, all open their groups and load their slices. When one of
them fails or stands still, the others give up their places again, and the error says who it was.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.errors import ClusterError, FormError, HostDied, HostSilent
from shardray.runtime.cluster.layout import CoreShare, own_memory, rank_order
from shardray.runtime.cluster.remote_host import RemoteHost
from shardray.runtime.cluster.reports import FailureKind, FormReport, RankFailure, place_text
from shardray.runtime.config import Config
from shardray.runtime.config.units import join_listen
from shardray.runtime.engine.assignment import ShardAssignment, ShardInfo

RankProgress = Callable[[int, RemoteHost, str, float], None]  # (rank, host, doing, fraction)
_POLL_S = 0.25
_GRACE_S = 2.0  # for the other ranks' reports after the first failure
_RELEASE_TIMEOUT_S = 5.0
_SHORTEST_SILENCE_S = 10.0
_IMPORT_SILENCE_S = 30.0  # on a busy machine an import holds the interpreter's lock for long
_T = TypeVar("_T")


@dataclass(frozen=True)
class MeshRecipe:
    """What to form: the settings (their ``parallel`` gives the shape) and where the model lies."""

    config: Config
    model_dir: str

    @property
    def tp_size(self) -> int:
        return self.config.parallel.tp_size

    @property
    def size(self) -> int:
        return self.config.parallel.hosts_per_replica

    @property
    def purpose(self) -> str:
        """All that a mesh is formed for but its shape: with another one it does not do what this recipe asks for."""
        model = self.config.model
        return repr((self.model_dir, model.dtype, model.max_model_len, self.config.engine, self.config.cluster.tls))


@dataclass(frozen=True)
class FormedMesh:
    """A mesh that is ready to run; ``hosts`` and ``shards`` are in rank order."""

    credentials: Credentials
    address: str  # host:port of the leader's server
    tp_size: int
    hosts: tuple[RemoteHost, ...]
    shards: tuple[ShardInfo, ...]
    load_s: float = 0.0  # of forming it, after its groups were open


async def form(
    hosts: Sequence[RemoteHost],
    shares: Sequence[CoreShare],
    recipe: MeshRecipe,
    bind_hosts: Sequence[str],
    on_progress: RankProgress,
) -> FormedMesh:
    """Form ``recipe``'s mesh from unassigned hosts; ``shares`` and ``bind_hosts`` go with ``hosts``.

    Fails once a host made no progress for ``ray.form_timeout_s``. Raises FormError; the hosts that still answer are
    then unassigned again and the others killed.
    """
    order = rank_order([host.info for host in hosts], recipe.tp_size)
    ranked = tuple(hosts[index] for index in order)
    for rank, host in enumerate(ranked):
        on_progress(rank, host, "importing the runtime", 0.0)
    try:
        assignments = await _assign(ranked, [shares[i] for i in order], recipe, [bind_hosts[i] for i in order])
        reports = await _Forming(ranked, recipe, on_progress).run(assignments)
    except ClusterError as error:
        survivors = await dissolve(ranked)
        raise FormError(f"forming the mesh failed: {error}", survivors) from error
    leader = assignments[0]
    return FormedMesh(
        credentials=leader.credentials,
        address=join_listen(leader.bind_host, reports[0].port or 0),
        tp_size=recipe.tp_size,
        hosts=ranked,
        shards=tuple(report.shard for report in reports if report.shard is not None),
        load_s=max(report.load_s for report in reports),
    )


async def dissolve(hosts: Sequence[RemoteHost]) -> list[RemoteHost]:
    """Take their places from hosts in any state; those that do not let go are killed. Returns the free ones."""

    async def free(host: RemoteHost) -> bool:
        try:
            await host.abort(_GRACE_S)
            await host.release(_RELEASE_TIMEOUT_S)
        except ClusterError:
            await host.kill()
            return False
        return True

    freed = await asyncio.gather(*(free(host) for host in hosts))
    return [host for host, is_free in zip(hosts, freed, strict=True) if is_free]


async def _assign(
    hosts: Sequence[RemoteHost], shares: Sequence[CoreShare], recipe: MeshRecipe, bind_hosts: Sequence[str]
) -> list[ShardAssignment]:
    """Every rank's assignment, after the leader-to-be opened the rendezvous."""
    config, timeout_s, silence_s = recipe.config, recipe.config.ray.form_timeout_s, _silence_s(recipe)
    import_silence_s = max(silence_s, min(_IMPORT_SILENCE_S, timeout_s))
    tls = tls_files(config)
    what = recipe.model_dir, config.model.dtype, tls, timeout_s
    preparing = (host.prepare(share.num_threads, *what) for host, share in zip(hosts, shares, strict=True))
    await asyncio.gather(
        *(_while_it_answers(host, call, import_silence_s) for host, call in zip(hosts, preparing, strict=True))
    )
    known = Credentials(epoch=secrets.token_hex(8), secret=secrets.token_hex(32), tls=tls)
    opening = hosts[0].open_rendezvous(bind_hosts[0], known, len(hosts), timeout_s)
    store_host, store_port = await _while_it_answers(hosts[0], opening, silence_s)
    nodes = tuple(host.info.node_id for host in hosts)
    return [
        ShardAssignment(
            epoch=known.epoch,
            secret=known.secret,
            tls=known.tls,
            rank=rank,
            tp_size=recipe.tp_size,
            pp_size=config.parallel.pp_size,
            nodes=nodes,
            store_host=store_host,
            store_port=store_port,
            bind_host=bind_hosts[rank],
            device=host.info.device,
            num_threads=shares[rank].num_threads,
            cpu_ids=shares[rank].cpu_ids,
            step_timeout_s=config.engine.step_timeout_s,
            form_timeout_s=timeout_s,
            model_dir=recipe.model_dir,
            dtype=config.model.dtype,
            max_model_len=config.model.max_model_len,
            max_num_seqs=config.engine.max_num_seqs,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_prefill_beside_decodes=config.engine.max_prefill_beside_decodes,
            max_draft_tokens=config.engine.max_draft_tokens,
            prefix_caching=config.engine.prefix_caching,
            block_size=config.engine.block_size,
            memory_utilization=own_memory(config.engine.memory_utilization, host.info, nodes, shares[rank]),
            kv_memory_bytes=config.engine.kv_memory_bytes,
            tensor_split=config.parallel.tensor_split,
            stage_layers=config.parallel.stage_layers,
            expert_parallel=config.parallel.expert_parallel,
            share_weights=config.engine.share_weights,
        )
        for rank, host in enumerate(hosts)
    ]


def _silence_s(recipe: MeshRecipe) -> float:
    """How long a host that forms may be silent: what it does can keep even a thread that only answers from running."""
    config = recipe.config
    return min(max(_SHORTEST_SILENCE_S, config.engine.step_timeout_s), config.ray.form_timeout_s)


async def _while_it_answers(host: RemoteHost, call: Coroutine[Any, Any, _T], silence_s: float) -> _T:
    """What ``call`` to ``host`` returns. Raises HostSilent once the host does not answer anything any more."""
    task = asyncio.create_task(call)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_S))[0]:
            await host.progress(silence_s)
        return task.result()
    finally:
        task.cancel()


class _Forming:
    """One form under way: a report from every rank, or the reason why not."""

    def __init__(self, hosts: Sequence[RemoteHost], recipe: MeshRecipe, on_progress: RankProgress) -> None:
        self._hosts = hosts
        self._recipe = recipe
        self._stall_timeout_s = recipe.config.ray.form_timeout_s
        self._silence_s = _silence_s(recipe)
        self._on_progress = on_progress
        self._doing = ["has not begun"] * len(hosts)

    async def run(self, assignments: Sequence[ShardAssignment]) -> list[FormReport]:
        ranks = [asyncio.create_task(self._form_rank(assignment)) for assignment in assignments]
        try:
            await asyncio.wait(ranks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in ranks):
                await asyncio.wait(ranks, timeout=_GRACE_S)
                raise FormError(self._reason(ranks))
            return [task.result() for task in ranks]
        finally:
            for task in ranks:
                task.cancel()
            await asyncio.gather(*ranks, return_exceptions=True)

    async def _form_rank(self, assignment: ShardAssignment) -> FormReport:
        """Raises ClusterError or _RankFailed."""
        rank, model = assignment.rank, self._recipe.config.model
        forming = self._hosts[rank].form(assignment, self._recipe.purpose, model.source, model.revision)
        call = asyncio.create_task(forming)
        try:
            await self._watch(rank, call)
        finally:
            call.cancel()
        report = call.result()
        if report.failure is not None:
            raise _RankFailed(report.failure)
        self._on_progress(rank, self._hosts[rank], "formed", 1.0)
        return report

    async def _watch(self, rank: int, call: asyncio.Task[FormReport]) -> None:
        """Pass on a rank's progress until its call ends. Raises FormError when it stands still too long."""
        seen: tuple[str, float] | None = None
        moved_at = time.monotonic()
        while not (await asyncio.wait({call}, timeout=_POLL_S))[0]:
            try:
                told = await self._hosts[rank].progress(self._silence_s)
            except HostDied:  # the call says so
                continue
            except HostSilent as error:
                raise FormError(f"it hangs: {error}; last seen: {self._doing[rank]}") from error
            if (progress := (told.doing, told.fraction)) != seen:
                seen, moved_at = progress, time.monotonic()
                self._doing[rank] = f"{progress[0]} ({progress[1]:.0%})"
                self._on_progress(rank, self._hosts[rank], *progress)
            elif time.monotonic() - moved_at > self._stall_timeout_s:
                last = f"last seen: {self._doing[rank]}"
                raise FormError(f"no progress for {self._stall_timeout_s:g} s (ray.form_timeout_s); {last}")

    def _reason(self, ranks: Sequence[asyncio.Task[FormReport]]) -> str:
        """Name the cause: own errors, deaths and stand-stills before those who only lost a peer."""
        errors = {rank: task.exception() for rank, task in enumerate(ranks) if task.done()}
        failures = [error.failure for error in errors.values() if isinstance(error, _RankFailed)]
        parts = _one_per_cause([failure for failure in failures if failure.kind is not FailureKind.LOST_PEER])
        for rank, error in errors.items():
            if error is not None and not isinstance(error, _RankFailed):
                parts.append(f"{self._place(rank)}: {error}")
        if not parts:
            waiting = [rank for rank, task in enumerate(ranks) if not task.done()]
            parts = _one_per_cause(failures)
            parts += [f"still waiting for {self._place(rank)}, last seen: {self._doing[rank]}" for rank in waiting]
        return "; ".join(parts)

    def _place(self, rank: int) -> str:
        info, tp_size = self._hosts[rank].info, self._recipe.tp_size
        return place_text(rank // tp_size, rank % tp_size, info.host, info.pid)


class _RankFailed(ClusterError):
    """A rank's form came back with a failure."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def _one_per_cause(failures: Sequence[RankFailure]) -> list[str]:
    """What is wrong with the model is wrong on every rank: say it once."""
    by_cause: dict[str, list[RankFailure]] = {}
    for failure in failures:
        by_cause.setdefault(failure.cause, []).append(failure)
    return [f"{first}{f' (and on {len(others)} more)' if others else ''}" for first, *others in by_cause.values()]


def tls_files(config: Config) -> TlsFiles | None:
    """Where every process of the fleet finds its certificates."""
    tls = config.cluster.tls
    return None if tls is None else TlsFiles(tls.ca, tls.cert, tls.key)
