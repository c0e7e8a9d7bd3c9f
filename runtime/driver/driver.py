"""Takes requests, hands them to replicas, and streams back what they yield.

A request is journalled, waits until a replica has a place, is dispatched there under an id of its own, and ends exactly
once: by its last token, a stop string, a cancel, its deadline, or the loss of its replica. Use it in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Sequence

from shardray.runtime.cluster.messages import Rejection, ServedModel
from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    QueueFullError,
    RequestError,
    UnavailableError,
)
from shardray.runtime.driver.fleet import Fleet, ReplicaStatus
from shardray.runtime.driver.journal import Journal, JournalEntry, MemoryJournal
from shardray.runtime.driver.link import LinkError, ReplicaLink
from shardray.runtime.driver.queue import WaitingQueue
from shardray.runtime.driver.router import pick_replica
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.assignment import ShardInfo
from shardray.runtime.engine.request import FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.model.tokenizer import Tokenizer

_RETRY_QUEUE_FULL_S = 1.0
_RETRY_UNAVAILABLE_S = 2.0
_SHUTDOWN = "the server is shutting down"


@dataclasses.dataclass
class _Live:
    """A request that has not ended."""

    entry: JournalEntry
    stream: RequestStream
    deadline: asyncio.TimerHandle
    replica_id: int | None = None  # None: it waits
    dispatch_id: str = ""


class Driver:
    """The fleet's front: ``submit`` for servers, ``attach`` and ``detach`` for the layer that forms replicas."""

    def __init__(
        self,
        model_id: str,
        tokenizer: Tokenizer | None,
        limits: LimitsSettings,
        max_num_seqs: int,
        journal: Journal | None = None,
    ) -> None:
        self.fleet = Fleet(model_id)
        self.tokenizer = tokenizer
        self.limits = limits
        self.model: ServedModel | None = None  # known once the first replica is ready
        self._journal: Journal = journal if journal is not None else MemoryJournal()
        # A replica gets a few more than it can run, so that a freed place is taken in its next step.
        self._replica_capacity = max_num_seqs + max(1, max_num_seqs // 8)
        self._links: dict[int, ReplicaLink] = {}
        self._waiting = WaitingQueue()
        self._live: dict[str, _Live] = {}
        self._dispatched: dict[str, _Live] = {}
        self._dispatch_counter = itertools.count()
        self._all_ended = asyncio.Event()
        self._stopping = False

    @staticmethod
    def choose_seed() -> int:
        """A seed for a request whose client gave none; 64 bits."""
        return secrets.randbits(64)

    def check_available(self) -> ServedModel:
        """The model, if requests can be taken now. Raises UnavailableError with the reason."""
        if self._stopping:
            raise UnavailableError(_SHUTDOWN, _RETRY_UNAVAILABLE_S)
        if self.model is None or not self.fleet.ready_replicas():
            status = self.fleet.snapshot()
            raise UnavailableError(f"the model is {status.state}: {status.reason}", _RETRY_UNAVAILABLE_S)
        return self.model

    def submit(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Take a request that was checked against ``check_available()``; iterate what is returned, then ``release`` it.

        ``timeout_s`` None means the default deadline; longer than the longest one is shortened to it.
        Raises UnavailableError, QueueFullError, DuplicateRequestError. Iterating raises UnavailableError,
        DeadlineExceededError or FieldError.
        """
        self.check_available()
        if request_id in self._live:
            raise DuplicateRequestError(f"request_id {request_id!r} is in flight; choose another or leave it empty")
        if len(self._waiting) >= self.limits.max_queued_requests and not self._candidates():
            message = f"{len(self._waiting)} requests are waiting, the most that limits.max_queued_requests allows"
            raise QueueFullError(message, _RETRY_QUEUE_FULL_S)
        timeout_s = min(self.limits.default_deadline_s if timeout_s is None else timeout_s, self.limits.max_deadline_s)
        entry = JournalEntry(request_id, prompt_ids, params, priority)
        stream = RequestStream(entry, self.tokenizer)
        deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire, request_id, timeout_s)
        self._journal.open(entry)
        self._live[request_id] = _Live(entry, stream, deadline)
        self._waiting.push(request_id, priority)
        self._dispatch()
        return stream

    def release(self, stream: RequestStream) -> None:
        """The client of this stream is gone: free what the request holds. Idempotent."""
        live = self._live.get(stream.request_id)
        if live is not None and live.stream is stream:
            self._cancel(live)

    def abort(self, request_id: str) -> bool:
        """End a request; its stream ends with ABORTED. Returns whether it was in flight."""
        live = self._live.get(request_id)
        if live is None:
            return False
        live.stream.finish(FinishReason.ABORTED)
        self._cancel(live)
        return True

    async def attach(self, replica_id: int, address: str, secret: str, shards: Sequence[ShardInfo]) -> None:
        """Take a formed replica into service. If it cannot be reached, marks it failed and raises LinkError."""
        link = ReplicaLink(on_events=self._on_events, on_stats=lambda stats: self.fleet.set_stats(replica_id, stats))
        self.fleet.set_loading(replica_id, "connecting to the leader", progress=1.0)
        try:
            model = await link.connect(address, secret)
        except LinkError as error:
            self.fleet.set_failed(replica_id, str(error))
            raise
        # Memory may differ from one replica to the next: promise what fits on any.
        smallest = min(model.num_kv_tokens, self.model.num_kv_tokens if self.model else model.num_kv_tokens)
        self.model = dataclasses.replace(model, num_kv_tokens=smallest)
        self._links[replica_id] = link
        link.closed.add_done_callback(lambda closed: self._on_link_closed(replica_id, link, closed.result()))
        self.fleet.set_ready(replica_id, shards)
        self._dispatch()

    async def detach(self, replica_id: int, reason: str) -> None:
        """Take a replica out of service: it is marked failed, and its requests fail with ``reason``."""
        link = self._links.get(replica_id)
        self._lose(replica_id, reason)
        if link is not None:
            await link.close()

    async def shutdown(self, grace_s: float) -> None:
        """Refuse new requests, give those in flight ``grace_s`` seconds, fail the rest, close the links."""
        self._stopping = True
        self.fleet.stop(_SHUTDOWN)
        if self._live:
            self._all_ended.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._all_ended.wait()
        for live in reversed(list(self._live.values())):  # newest first: no place is given to one that waits
            live.stream.fail(UnavailableError(_SHUTDOWN, _RETRY_UNAVAILABLE_S))
            self._cancel(live)
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))
        self.fleet.close()

    def _candidates(self) -> list[ReplicaStatus]:
        ready = self.fleet.ready_replicas()
        return [replica for replica in ready if replica.num_live_requests < self._replica_capacity]

    def _dispatch(self) -> None:
        """Hand waiting requests to replicas, as long as both are there."""
        while self._waiting and (candidates := self._candidates()):
            live = self._live[self._waiting.pop()]
            replica_id = pick_replica(live.entry, candidates).replica_id
            # Not the client's id: that one may come again while a replica still has the end of its last use to tell.
            live.dispatch_id = f"{live.entry.request_id}#{next(self._dispatch_counter)}"
            live.replica_id = replica_id
            self._dispatched[live.dispatch_id] = live
            self.fleet.add_live(replica_id, +1)
            live.stream.mark_dispatched()
            self._links[replica_id].submit(live.entry.as_engine_request(live.dispatch_id))
        self.fleet.set_requests(len(self._waiting), len(self._live))

    def _on_events(self, outputs: list[TokenOutput], rejections: list[Rejection]) -> None:
        for output in outputs:
            if (live := self._dispatched.get(output.request_id)) is not None:
                self._on_output(live, output)
        for rejection in rejections:
            if (live := self._dispatched.get(rejection.request_id)) is not None:
                live.stream.fail(FieldError(rejection.field, rejection.message))
                self._end(live)

    def _on_output(self, live: _Live, output: TokenOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            reason = output.error or "the replica could not finish the request"
            live.stream.fail(UnavailableError(reason, _RETRY_UNAVAILABLE_S))
            self._end(live)
            return
        if output.token_id is not None:
            self._journal.append(live.entry.request_id, output.token_id)
        live.stream.push(output)
        if output.finish_reason is not None:
            self._end(live)
        elif live.stream.ended:  # a stop string, of which the engine knows nothing
            self._cancel(live)

    def _expire(self, request_id: str, timeout_s: float) -> None:
        live = self._live[request_id]
        message = f"the request did not end within its deadline of {round(timeout_s, 1):g} s"
        live.stream.fail(DeadlineExceededError(message))
        self._cancel(live)

    def _cancel(self, live: _Live) -> None:
        if live.replica_id is not None and (link := self._links.get(live.replica_id)) is not None:
            link.cancel(live.dispatch_id)
        self._end(live)

    def _end(self, live: _Live) -> None:
        """Forget a request; its place goes to the next one."""
        live.deadline.cancel()
        del self._live[live.entry.request_id]
        self._journal.close(live.entry.request_id)
        self._waiting.remove(live.entry.request_id)
        if live.replica_id is not None:
            del self._dispatched[live.dispatch_id]
            self.fleet.add_live(live.replica_id, -1)
        if not self._live:
            self._all_ended.set()
        self._dispatch()

    def _on_link_closed(self, replica_id: int, link: ReplicaLink, reason: str) -> None:
        if self._links.get(replica_id) is link:
            self._lose(replica_id, reason)

    def _lose(self, replica_id: int, reason: str) -> None:
        """A replica is gone: its requests fail, and the waiting ones too if it was the last."""
        self._links.pop(replica_id, None)
        self.fleet.set_failed(replica_id, reason)
        lost = [live for live in self._live.values() if live.replica_id == replica_id]
        if not self.fleet.ready_replicas():
            lost = list(self._live.values())
        error: RequestError = UnavailableError(f"replica {replica_id} was lost: {reason}", _RETRY_UNAVAILABLE_S)
        for live in lost:
            live.stream.fail(error)
            self._end(live)
