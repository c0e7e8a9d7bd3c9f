"""All requests in flight: each is in the journal, has a deadline, and a client that may go, and come back.

A request that was submitted as resumable outlives its client's connection by ``resumable_s``; any other ends with it.
Where the journal outlives the driver, so do resumable requests.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping

from shardray.runtime.driver.caller import public_id
from shardray.runtime.driver.errors import TakenOverError, UnknownRequestError
from shardray.runtime.driver.journal import Journal
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.request import FieldError
from shardray.runtime.model.tokenizer import Tokenizer


class Register(Mapping[str, LiveRequest]):
    """Requests by id, oldest first. Use it in one asyncio loop.

    ``on_deadline`` and ``on_given_up`` (its client will not come back) have to end the request they are given.
    """

    def __init__(
        self,
        journal: Journal,
        on_deadline: Callable[[LiveRequest], None],
        on_given_up: Callable[[LiveRequest], None],
        observer: RequestObserver,
    ) -> None:
        self._journal = journal
        self._on_deadline = on_deadline
        self._on_given_up = on_given_up
        self.observer = observer
        self._live: dict[str, LiveRequest] = {}
        self._absences: dict[str, asyncio.TimerHandle] = {}  # of clients that are away
        self._arrivals = itertools.count()

    def __getitem__(self, request_id: str) -> LiveRequest:
        return self._live[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def open(self, entry: JournalEntry, tokenizer: Tokenizer | None) -> LiveRequest:
        """Take a request in. Raises KeyError if one with its id is in flight."""
        self._journal.open(entry)
        return self._enter(entry, tokenizer)

    def restore(self, tokenizer: Tokenizer | None) -> list[LiveRequest]:
        """Take in what an earlier driver left in the journal. Call it once, before anything else."""
        restored = [self._enter(entry, tokenizer) for entry in self._journal.entries()]
        for live in restored:
            self.leave(live)
        return restored

    def close(self, live: LiveRequest) -> None:
        """A request has ended."""
        self.observer.on_end(live)
        live.deadline.cancel()
        self._end_absence(live)
        del self._live[live.request_id]
        self._journal.close(live.request_id, live.stream.end)

    def leave(self, live: LiveRequest) -> None:
        """The client of a request is gone; that of a resumable one may come back."""
        if not live.entry.resumable_s:
            self._on_given_up(live)
        elif live.request_id not in self._absences:
            timer = asyncio.get_running_loop().call_later(live.entry.resumable_s, self._on_given_up, live)
            self._absences[live.request_id] = timer

    async def resume(
        self, request_id: str, num_seen_tokens: int, num_seen_chars: int, tokenizer: Tokenizer | None
    ) -> RequestStream:
        """What is left of a stream, in flight or retained, for a client that has seen a part; no other has it then.

        Raises UnknownRequestError, SuspendedError, FieldError.
        """
        live = self._live.get(request_id)
        entry = live.entry if live is not None else await self._journal.find_ended(request_id)
        if entry is None:
            raise UnknownRequestError(request_id)
        if not entry.resumable_s:
            raise FieldError("resume", f"request_id {public_id(request_id)!r} was submitted without resumable_s")
        if num_seen_tokens > entry.params.max_tokens:
            raise FieldError("resume.num_tokens", f"{num_seen_tokens} exceeds its max_tokens {entry.params.max_tokens}")
        stream = RequestStream(entry, tokenizer, num_seen_tokens, num_seen_chars)
        if live is not None:
            self._end_absence(live)
            live.stream.fail(TakenOverError(f"another client resumed request_id {public_id(request_id)!r}"))
            live.stream = stream
        return stream

    def _enter(self, entry: JournalEntry, tokenizer: Tokenizer | None) -> LiveRequest:
        stream = RequestStream(entry, tokenizer)
        loop = asyncio.get_running_loop()
        remaining_s = max(0.0, entry.deadline_s - time.monotonic())
        deadline = loop.call_later(remaining_s, lambda: self._on_deadline(self._live[entry.request_id]))
        live = self._live[entry.request_id] = LiveRequest(entry, stream, deadline, next(self._arrivals))
        self.observer.on_accept(live)
        return live

    def _end_absence(self, live: LiveRequest) -> None:
        if (timer := self._absences.pop(live.request_id, None)) is not None:
            timer.cancel()
