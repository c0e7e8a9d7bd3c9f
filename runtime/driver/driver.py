"""Takes requests, hands them to replicas, and streams back what they yield.

A request is journalled, waits until a replica has a place, and ends exactly once: by its last token, a stop string, a
cancel, its deadline, or the loss of its client. A replica that is lost, or gives way to another, gives its requests
back; they wait in their old places and go on, on any mesh, behind the tokens that were sent. For one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from shardray.parallel.credentials import Credentials
from shardray.runtime.cluster.messages import Rejection
from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.admission import Admission
from shardray.runtime.driver.dispatches import Dispatches
from shardray.runtime.driver.errors import (
    BrokenRequestError,
    DeadlineExceededError,
    DuplicateRequestError,
    SuspendedError,
    UnavailableError,
)
from shardray.runtime.driver.fleet import Fleet, ReplicaStatus
from shardray.runtime.driver.journal import Journal, MemoryJournal
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.link import ReplicaLink
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.driver.queue import WaitingQueue
from shardray.runtime.driver.register import Register
from shardray.runtime.driver.router import Router
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.driver.trials import Trials
from shardray.runtime.engine.assignment import ShardInfo
from shardray.runtime.engine.request import (
    EngineStats,
    FieldError,
    FinishReason,
    SamplingParams,
    ServedModel,
    TokenOutput,
)
from shardray.runtime.model.spec import Pooling
from shardray.runtime.model.tokenizer import Tokenizer

_SHUTDOWN = "the server is shutting down"


class Driver:
    """The fleet's front: ``submit`` for servers, ``attach`` and ``suspend`` for the layer that forms replicas."""

    def __init__(
        self,
        model_id: str,
        tokenizer: Tokenizer | None,
        limits: LimitsSettings,
        max_num_seqs: int,
        journal: Journal | None = None,
        observer: RequestObserver | None = None,
        shares_between_callers: bool = False,
    ) -> None:
        self.fleet = Fleet(model_id)
        self.tokenizer = tokenizer
        self.limits = limits
        self.model: ServedModel | None = None  # known once the first replica is ready
        self.journal: Journal = journal if journal is not None else MemoryJournal()
        self._router = Router(shares_between_callers)
        self._dispatches = Dispatches(self.fleet, self._router, max_num_seqs)
        self._models: dict[int, ServedModel] = {}  # by replica id
        self._waiting = WaitingQueue()
        self._trials = Trials()
        self._live = Register(self.journal, self._expire, self._abort, observer or RequestObserver())
        self.admission = Admission(limits, self.fleet, self._live, self._waiting, self._candidates)
        self._all_ended = asyncio.Event()
        self.on_link_lost: Callable[[int], None] = lambda replica_id: None

    def check_available(self) -> ServedModel:
        """The model, if requests can be taken now. Raises UnavailableError with the reason."""
        return self.admission.check_available(self.model)

    def submit(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        timeout_s: float | None = None,
        priority: int = 0,
        resumable_s: float = 0.0,
        pooling: Pooling | None = None,
    ) -> RequestStream:
        """Take a request that was checked against ``check_available()``; iterate what is returned, then ``release`` it.

        ``timeout_s`` None means the default deadline; longer than the longest one is shortened to it. Released before
        its end it goes on, and can be resumed, for ``resumable_s``, at most as long as the journal retains it.
        Raises UnavailableError, QueueFullError, DuplicateRequestError. Iterating raises UnavailableError,
        DeadlineExceededError or FieldError.
        """
        self.check_available()
        if request_id in self._live:
            raise DuplicateRequestError(request_id)
        self.admission.check()
        deadline_s, resumable_s = self.admission.bound_s(timeout_s), min(resumable_s, self.journal.retain_s)
        entry = JournalEntry(request_id, prompt_ids, params, priority, deadline_s, resumable_s, pooling=pooling)
        live = self._live.open(entry, self.tokenizer)
        self._waiting.push(request_id, priority, live.arrival)
        self._dispatch()
        return live.stream

    def restore(self) -> None:
        """Go on with what an earlier driver left in the journal. Call it once, before anything else."""
        for live in self._live.restore(self.tokenizer):
            self._waiting.push(live.request_id, live.entry.priority, live.arrival)
        self._dispatch()

    async def resume(self, request_id: str, num_seen_tokens: int, num_seen_chars: int) -> RequestStream:
        """The rest of a resumable request that was released, or that another client still reads; ``release`` it too.

        Raises UnknownRequestError, SuspendedError, FieldError. Iterating also raises TakenOverError.
        """
        return await self._live.resume(request_id, num_seen_tokens, num_seen_chars, self.tokenizer)

    def release(self, stream: RequestStream) -> None:
        """The client of this stream is gone: free what the request holds, unless it may come back. Idempotent."""
        live = self._live.get(stream.request_id)
        if live is not None and live.stream is stream:
            self._live.leave(live)

    def abort(self, request_id: str) -> bool:
        """End a request; its stream ends with ABORTED. Returns whether it was in flight."""
        if (live := self._live.get(request_id)) is None:
            self.journal.close(request_id)  # its end need not be retained
            return False
        self._abort(live)
        return True

    async def attach(self, replica_id: int, address: str, known: Credentials, shards: Sequence[ShardInfo]) -> None:
        """Take a formed replica into service; one that it had under this id gives its requests up for it.

        Raises LinkError if it cannot be reached; nothing has changed then.
        """
        link = ReplicaLink(self._on_events, lambda stats: self._on_stats(replica_id, link, stats))
        model = await link.connect(address, known)
        before = self._dispatches.links.pop(replica_id, None)
        self._take_back(replica_id, before)
        self._dispatches.links[replica_id] = link
        self._models[replica_id] = model
        self._router.attach(replica_id, model)
        # Memory may differ from one replica to the next: promise what fits on any.
        smallest = min(model.num_kv_tokens for model in self._models.values())
        self.model = dataclasses.replace(model, num_kv_tokens=smallest)
        link.closed.add_done_callback(lambda closed: self._on_link_closed(replica_id, link, closed.result()))
        self.fleet.set_ready(replica_id, shards)
        self._on_stats(replica_id, link, link.stats)  # those that came with the model
        self._dispatch()
        if before is not None:
            await before.close()

    def suspend(self, replica_id: int, reason: str, failed: bool) -> None:
        """A replica is gone for now: what it ran waits, for it or for another one.

        ``failed``: it was not to end, and a request that it ran may be why.
        """
        link = self._dispatches.links.pop(replica_id, None)
        self._router.detach(replica_id)
        self.fleet.set_recovering(replica_id, reason)
        if link is not None:
            lost = self._take_back(replica_id, None if failed else link)
            if failed and (culprit := self._trials.judge(lost, self._waiting)) is not None:
                message = f"this request breaks the step that runs it, also alone: {reason}"
                culprit.stream.fail(BrokenRequestError(message))
                self._end(culprit)
            self._dispatches.close_soon(link)
            self._dispatch()

    async def retire(self, replica_id: int) -> None:
        """A replica will not come back: others run what it ran."""
        link = self._dispatches.links.pop(replica_id, None)
        self._take_back(replica_id, link)
        self._models.pop(replica_id, None)
        self._router.detach(replica_id)
        self.fleet.remove(replica_id)
        self._dispatch()
        if link is not None:
            await link.close()

    def give_up(self, replica_id: int, reason: str) -> None:
        """A replica failed for good; without any other, every request fails with ``reason``."""
        self.suspend(replica_id, reason, failed=False)
        self._models.pop(replica_id, None)
        self.fleet.set_failed(replica_id, reason)
        if not self.fleet.has_hope:
            for live in list(self._live.values()):
                live.stream.fail(UnavailableError(f"replica {replica_id} failed: {reason}"))
                self._end(live)

    def forget_prefixes(self) -> None:
        """What replicas have computed so far is shared with no request to come."""
        for replica_id, link in self._dispatches.links.items():
            self._router.attach(replica_id, self._models[replica_id])
            link.forget_prefixes()

    def refuse_new(self, reason: str) -> None:
        """Take no more requests; those in flight go on."""
        self.admission.close(reason)

    async def wait_until_idle(self, timeout_s: float) -> None:
        """Until no request is in flight, or the time is over."""
        if self._live:
            self._all_ended.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_ended.wait(), timeout_s)

    async def shutdown(self, grace_s: float) -> None:
        """Refuse new requests, give those in flight ``grace_s`` seconds, fail the rest, close the links."""
        self.refuse_new(_SHUTDOWN)
        await self.wait_until_idle(grace_s)
        await self.journal.stop()  # as it is now: what is in flight is left to the next driver
        for live in reversed(list(self._live.values())):  # newest first: no place is given to one that waits
            if live.entry.resumable_s and self.journal.outlives_driver:
                live.stream.fail(SuspendedError(f"{_SHUTDOWN}; the request goes on when it is started again"))
            else:
                live.stream.fail(UnavailableError(_SHUTDOWN))
            self._cancel(live)
        await self._dispatches.close()
        self.fleet.close()

    def _candidates(self) -> list[ReplicaStatus]:
        return [one for one in self._dispatches.with_room() if not self._trials.occupies(one.replica_id)]

    def _dispatch(self) -> None:
        """Hand waiting requests to replicas, as long as both are there."""
        if self._trials.is_due:
            self._try_suspect()
        while self._waiting and (candidates := self._candidates()):
            live = self._live[self._waiting.pop()]
            self._dispatches.send(live, self._router.pick(live.entry, candidates).replica_id)
        self.admission.pace.observe(len(self._waiting))
        self.fleet.set_requests(len(self._waiting), len(self._live))

    def _try_suspect(self) -> None:
        """Clear the least loaded replica for a request that has to run alone."""
        if replicas := self.fleet.ready_replicas():
            live = self._trials.begin()
            replica_id = self._router.pick(live.entry, replicas).replica_id
            self._take_back(replica_id, self._dispatches.links[replica_id])
            self._dispatches.send(live, replica_id)

    def _take_back(self, replica_id: int, link: ReplicaLink | None) -> list[LiveRequest]:
        """Put what a replica runs back into its place in the queue.

        ``link`` tells it to stop, and a trial there is made again; None: it has stopped, and its trial is to be judged.
        """
        taken = self._dispatches.withdraw_all(replica_id, link)
        for live in taken:
            self._waiting.push(live.request_id, live.entry.priority, live.arrival)
        if link is not None and (suspect := self._trials.current) in taken:
            self._trials.interrupt()
            self._waiting.remove(suspect.request_id)  # its trial dispatches it, not its turn
        return taken

    def _on_events(self, outputs: list[TokenOutput], rejections: list[Rejection]) -> None:
        for output in outputs:
            if (live := self._dispatches.by_id.get(output.request_id)) is not None:
                self._on_output(live, output)
        for rejection in rejections:
            if (live := self._dispatches.by_id.get(rejection.request_id)) is not None:
                live.stream.fail(FieldError(rejection.field, rejection.message))
                self._end(live)

    def _on_output(self, live: LiveRequest, output: TokenOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            live.stream.fail(BrokenRequestError(output.error or "the replica could not finish the request"))
            return self._end(live)
        if output.steps:
            self._live.observer.on_steps(live, output.steps)
        if output.token_id is not None:
            self.journal.append(live.request_id, output)
            self._live.observer.on_token(live)
        live.stream.push(output)
        if output.finish_reason is not None:
            self._end(live)
        elif live.stream.ended:  # a stop string, of which the engine knows nothing
            self._cancel(live)
        elif live is self._trials.current and live.made_progress:
            self._trials.acquit()
            self._dispatch()

    def _expire(self, live: LiveRequest) -> None:
        message = f"the request did not end within its deadline of {round(live.entry.timeout_s, 1):g} s"
        live.stream.fail(DeadlineExceededError(message))
        self._cancel(live)

    def _abort(self, live: LiveRequest) -> None:
        live.stream.finish(FinishReason.ABORTED)
        self._cancel(live)

    def _cancel(self, live: LiveRequest) -> None:
        self._dispatches.cancel(live)
        self._end(live)

    def _end(self, live: LiveRequest) -> None:
        """Forget a request; its place goes to the next one."""
        self._live.close(live)
        self._waiting.remove(live.request_id)
        self._trials.forget(live)
        self._dispatches.withdraw(live)
        if not self._live:
            self._all_ended.set()
        self._dispatch()

    def _on_stats(self, replica_id: int, link: ReplicaLink, stats: EngineStats) -> None:
        if self._dispatches.links.get(replica_id) is link:
            self.fleet.set_stats(replica_id, stats)

    def _on_link_closed(self, replica_id: int, link: ReplicaLink, reason: str) -> None:
        if self._dispatches.links.get(replica_id) is link:
            self.suspend(replica_id, reason, failed=True)
            self.on_link_lost(replica_id)
