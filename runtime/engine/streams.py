"""Requests in flight on an engine of this process, read by one thread: a step wakes it once, whatever their number."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from shardray.runtime.engine.output import Delta, OutputText
from shardray.runtime.engine.request import SamplingParams, TokenOutput
from shardray.runtime.model.spec import Pooling

Prompt = str | Sequence[int]


class Streamed(NamedTuple):
    """What came for one request: ``number`` counts those of its ``Streams`` in the order they were added, from 0."""

    number: int
    delta: Delta
    output: TokenOutput


class Inbox:
    """Where an engine's thread leaves what a step made for requests that are read together."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[list[TokenOutput] | BaseException] = queue.SimpleQueue()

    def put(self, step: list[TokenOutput] | BaseException) -> None:
        """The outputs of a step, or what ended the engine."""
        self._steps.put(step)

    def take(self, timeout_s: float | None) -> list[TokenOutput]:
        """The next step's; empty if none came in time. Raises RuntimeError if the engine has ended."""
        try:
            step = self._steps.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(step, BaseException):
            self._steps.put(step)  # for whoever asks again
            raise RuntimeError(f"the engine stopped: {step}") from step
        return step


class Mailroom:
    """Which inbox each live request of an engine belongs to. Safe from any thread."""

    def __init__(self) -> None:
        self._inboxes: dict[str, Inbox] = {}
        self._failure: BaseException | None = None

    def open(self, request_id: str, inbox: Inbox) -> None:
        self._inboxes[request_id] = inbox
        if self._failure is not None:
            inbox.put(self._failure)

    def forget(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """One step's outputs, each to its inbox."""
        by_inbox: dict[Inbox, list[TokenOutput]] = {}
        for output in outputs:
            if (inbox := self._inboxes.get(output.request_id)) is not None:
                by_inbox.setdefault(inbox, []).append(output)
                if output.finish_reason is not None:
                    self.forget(output.request_id)
        for inbox, own in by_inbox.items():
            inbox.put(own)

    def fail(self, failure: BaseException) -> None:
        """The engine has ended: whoever waits, or will, hears of it."""
        self._failure = failure
        for inbox in set(self._inboxes.values()):
            inbox.put(failure)


class Start(Protocol):
    """Submits a request whose outputs go to an inbox; its id, and what makes text of them."""

    def __call__(
        self, prompt: Prompt, params: SamplingParams | None, pooling: Pooling | None, inbox: Inbox
    ) -> tuple[str, OutputText]: ...


class Streams:
    """Deltas of several requests as they come; more may be added meanwhile. One thread adds and reads.

    Iterating over it ends when no request is left. Closing it cancels what still runs.
    """

    def __init__(self, start: Start, cancel: Callable[[str], None]) -> None:
        self._start = start
        self._cancel = cancel
        self._inbox = Inbox()
        self._live: dict[str, tuple[int, OutputText]] = {}
        self._num_added = 0
        self._came: deque[Streamed] = deque()

    def add(self, prompt: Prompt, params: SamplingParams | None = None, pooling: Pooling | None = None) -> int:
        """Submit a request; its number. Raises FieldError for one that cannot run."""
        request_id, text = self._start(prompt, params, pooling, self._inbox)
        self._live[request_id] = self._num_added, text
        self._num_added += 1
        return self._num_added - 1

    @property
    def num_live(self) -> int:
        """Requests of which more is to come."""
        return len(self._live)

    def poll(self, timeout_s: float | None = None) -> list[Streamed]:
        """What the next step brings; empty if it brings nothing for these requests, or none came in time."""
        return [one for output in self._inbox.take(timeout_s) if (one := self._read(output)) is not None]

    def __iter__(self) -> Iterator[Streamed]:
        return self

    def __next__(self) -> Streamed:
        while not self._came:
            if not self._live:
                raise StopIteration
            self._came.extend(self.poll())
        return self._came.popleft()

    def close(self) -> None:
        for request_id in self._live:
            self._cancel(request_id)
        self._live.clear()

    def _read(self, output: TokenOutput) -> Streamed | None:
        if output.request_id not in self._live:
            return None  # a stop string ended its text before
        number, text = self._live[output.request_id]
        delta = text.push(output)
        if text.ended:
            del self._live[output.request_id]
            if delta.stopped:
                self._cancel(output.request_id)
        return Streamed(number, delta, output)
