"""Every request in flight, with the tokens its client was sent: all that another mesh needs to go on with it.

Requests that were submitted as resumable are kept for a while after their end as well, for clients that lost their
connection and ask for the rest.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.engine.request import FinishReason, TokenOutput

DEFAULT_RETAIN_S = 300.0
_MAX_RETAINED_BYTES = 8 << 20


class Journal(Protocol):
    """Where entries are kept. Calls come from one asyncio loop and do not block."""

    @property
    def retain_s(self) -> float:
        """How long at most a request is kept for a client that is away, and after its end."""

    @property
    def outlives_driver(self) -> bool:
        """Whether another driver can go on with what is in flight."""

    def open(self, entry: JournalEntry) -> None:
        """A request was accepted. Raises KeyError if one with its id is in flight; forgets one that has ended."""

    def append(self, request_id: str, token: TokenOutput) -> None:
        """A token is about to be sent. What is written in one callback of the loop is kept whole or not at all."""

    def close(self, request_id: str, end: RequestEnd | None = None) -> None:
        """A request has ended: it is retained if ``is_retained``, else forgotten. An unknown id is ignored."""

    def entries(self) -> Iterable[JournalEntry]:
        """Requests in flight, oldest first; at start those that an earlier driver left."""

    def set_model(self, identity: str) -> None:
        """Requests in flight go on with this model from now on."""

    async def find_ended(self, request_id: str) -> JournalEntry | None:
        """A retained request. Raises SuspendedError after ``stop``, if the next driver will know."""

    async def sync(self) -> None:
        """Until everything written so far would outlive this process, if this journal does."""

    async def stop(self) -> None:
        """Write nothing more: requests in flight are left to the next driver, if this journal outlives this one."""


def is_retained(entry: JournalEntry, end: RequestEnd | None) -> bool:
    """Whether a client may still want the rest of a request that has ended. After an abort nobody does."""
    return end is not None and entry.resumable_s > 0 and end.reason is not FinishReason.ABORTED


class MemoryJournal:
    """Entries live as long as the driver. Of requests that have ended only the newest 8 MiB are retained."""

    outlives_driver = False

    def __init__(self, retain_s: float = DEFAULT_RETAIN_S) -> None:
        self.retain_s = retain_s
        self._entries: dict[str, JournalEntry] = {}
        self._retained: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # oldest first; when each is forgotten
        self._num_retained_bytes = 0

    def open(self, entry: JournalEntry) -> None:
        if entry.request_id in self._entries:
            raise KeyError(entry.request_id)
        self._forget(entry.request_id)
        self._entries[entry.request_id] = entry

    def append(self, request_id: str, token: TokenOutput) -> None:
        self._entries[request_id].append(token)

    def close(self, request_id: str, end: RequestEnd | None = None) -> None:
        self._forget(request_id)
        entry = self._entries.pop(request_id, None)
        if entry is not None and is_retained(entry, end):
            entry.end = end
            self._retain(request_id, entry.to_bytes())

    def entries(self) -> list[JournalEntry]:
        return list(self._entries.values())

    def set_model(self, identity: str) -> None:
        """Nothing to do: there is no later driver that could serve another one."""

    async def find_ended(self, request_id: str) -> JournalEntry | None:
        expires_s, data = self._retained.get(request_id, (0.0, b""))
        return JournalEntry.from_bytes(data) if expires_s > time.monotonic() else None

    async def sync(self) -> None:
        """At once: nothing outlives this process."""

    async def stop(self) -> None:
        """Nothing to do: nothing outlives this process."""

    def _retain(self, request_id: str, data: bytes) -> None:
        now_s = time.monotonic()
        self._retained[request_id] = (now_s + self.retain_s, data)
        self._num_retained_bytes += len(data)
        while self._retained:
            oldest_id, (expires_s, _) = next(iter(self._retained.items()))
            if expires_s > now_s and self._num_retained_bytes <= _MAX_RETAINED_BYTES:
                break
            self._forget(oldest_id)

    def _forget(self, request_id: str) -> None:
        _, data = self._retained.pop(request_id, (0.0, b""))
        self._num_retained_bytes -= len(data)
