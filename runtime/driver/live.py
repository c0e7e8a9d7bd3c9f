"""A request in the driver's care, from its acceptance to its end."""

from __future__ import annotations

import asyncio
import dataclasses

from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.stream import RequestStream

# A request that made fewer tokens on a mesh before that broke made no progress there. More than one: what comes back
# from a lost mesh starts with a prefill, and a request may break the decode behind it.
_PROGRESS_TOKENS = 4
_STRIKES = 2


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """A request that has not ended."""

    entry: JournalEntry
    stream: RequestStream
    deadline: asyncio.TimerHandle
    arrival: int  # counts requests; keeps its place in the queue
    replica_id: int | None = None  # None: it waits
    dispatch_id: str = ""
    last_token_s: float | None = None  # when it came, if somebody observes that
    num_dispatched_with: int = 0  # tokens that were sent when it was dispatched last
    num_strikes: int = 0  # meshes in a row that broke before it made progress
    num_failed_trials: int = 0  # meshes that broke while they ran nothing else
    is_traced: bool = False  # somebody wants to know of its steps

    @property
    def request_id(self) -> str:
        return self.entry.request_id

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what breaks the meshes."""
        return self.num_strikes >= _STRIKES

    @property
    def made_progress(self) -> bool:
        """Whether it went on since it was dispatched last."""
        return len(self.entry.sent_ids) - self.num_dispatched_with >= _PROGRESS_TOKENS

    def strike(self) -> None:
        """The mesh that it was dispatched to broke."""
        self.num_strikes = 0 if self.made_progress else self.num_strikes + 1

    def clear(self) -> None:
        """It went on while it ran alone: something else breaks the meshes."""
        self.num_strikes = self.num_failed_trials = 0
