"""When a request is refused because too many are in flight, of one caller or of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.caller import Caller
from shardray.runtime.driver.errors import CallerLimitError, QueueFullError
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.pace import QueuePace


class Admission:
    """Looks at requests in flight when one more asks to be taken; keeps no counts of its own."""

    def __init__(
        self,
        limits: LimitsSettings,
        live: Mapping[str, LiveRequest],
        waiting: Sized,
        pace: QueuePace,
        has_place: Callable[[], object],
    ) -> None:
        self._limits = limits
        self._live = live
        self._waiting = waiting
        self._pace = pace
        self._has_place = has_place  # whether a replica would take a request at once

    def check(self, caller: Caller | None = None) -> None:
        """Raises CallerLimitError, QueueFullError."""
        if caller is not None and (caller.max_requests or caller.max_queued):
            self._check_caller(caller)
        if self._has_place():
            return
        if len(self._waiting) >= self._limits.max_queued_requests:
            self._refuse(f"{len(self._waiting)} requests are waiting", "max_queued_requests")
        waiting = [live.entry for live in self._live.values() if live.replica_id is None]
        num_tokens = sum(len(entry.prompt_ids) + len(entry.sent_ids) for entry in waiting)
        if num_tokens >= self._limits.max_queued_tokens:
            self._refuse(f"requests of {num_tokens} tokens are waiting", "max_queued_tokens")

    def _refuse(self, what: str, key: str) -> None:
        raise QueueFullError(f"{what}, the most that limits.{key} allows", self._pace.drain_s())

    def _check_caller(self, caller: Caller) -> None:
        own = [live for request_id, live in self._live.items() if request_id.startswith(caller.own_id(""))]
        if caller.max_requests is not None and len(own) >= caller.max_requests:
            message = f"{caller.name} has {len(own)} requests in flight, the most that its max_requests allows"
            raise CallerLimitError(message, self._pace.drain_s())
        num_waiting = sum(live.replica_id is None for live in own)
        if caller.max_queued is not None and num_waiting >= caller.max_queued and not self._has_place():
            message = f"{caller.name} has {num_waiting} requests waiting, the most that its max_queued allows"
            raise CallerLimitError(message, self._pace.drain_s())
