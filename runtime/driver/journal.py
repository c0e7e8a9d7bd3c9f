"""Every request in flight, with the tokens its client was sent: all that another mesh needs to go on with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from shardray.runtime.engine.request import EngineRequest, SamplingParams


@dataclasses.dataclass
class JournalEntry:
    """One request. ``params`` has a seed, so that the continuation is the same text on any mesh."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    sent_ids: list[int] = dataclasses.field(default_factory=list)

    def as_engine_request(self, dispatch_id: str) -> EngineRequest:
        """What a replica is handed, now or after another one was lost."""
        return EngineRequest(
            request_id=dispatch_id,
            prompt_ids=self.prompt_ids,
            generated_ids=tuple(self.sent_ids),
            params=self.params,
            priority=self.priority,
        )


class Journal(Protocol):
    """Where entries are kept. Calls come from one thread and must not block."""

    def open(self, entry: JournalEntry) -> None: ...
    def append(self, request_id: str, token_id: int) -> None: ...
    def close(self, request_id: str) -> None: ...
    def entries(self) -> Iterable[JournalEntry]: ...


class MemoryJournal:
    """Entries live as long as the driver."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def open(self, entry: JournalEntry) -> None:
        """Raises KeyError if a request with this id is in flight."""
        if entry.request_id in self._entries:
            raise KeyError(entry.request_id)
        self._entries[entry.request_id] = entry

    def append(self, request_id: str, token_id: int) -> None:
        self._entries[request_id].sent_ids.append(token_id)

    def close(self, request_id: str) -> None:
        """Forget a request that has ended; an unknown id is ignored."""
        self._entries.pop(request_id, None)

    def entries(self) -> list[JournalEntry]:
        return list(self._entries.values())
