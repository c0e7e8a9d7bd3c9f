"""Whether a request is taken, and how long it may take: what is known before it is anyone's turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.caller import Caller
from shardray.runtime.driver.errors import CallerLimitError, QueueFullError, UnavailableError
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.pace import QueuePace
from shardray.runtime.engine.request import ServedModel


class Admission:
    """The door; it may be closed for good. Looks at the requests in flight and keeps no counts of its own."""

    def __init__(
        self,
        limits: LimitsSettings,
        fleet: Fleet,
        live: Mapping[str, LiveRequest],
        waiting: Sized,
        has_place: Callable[[], object],
    ) -> None:
        self.pace = QueuePace()  # of the requests that wait
        self._limits = limits
        self._fleet = fleet
        self._live = live
        self._waiting = waiting
        self._has_place = has_place  # whether a replica would take a request at once
        self._refusal: str | None = None

    def close(self, reason: str) -> None:
        """Take no more requests."""
        self._refusal = reason
        self._fleet.stop(reason)

    def check_available(self, model: ServedModel | None) -> ServedModel:
        """The model, if requests can be taken now. Raises UnavailableError with the reason."""
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        if model is None or not self._fleet.takes_requests:
            status = self._fleet.snapshot()
            raise UnavailableError(f"the model is {status.state}: {status.reason}")
        return model

    def check(self, caller: Caller | None = None) -> None:
        """Look whether too many are in flight for one more, of one caller or of all.

        Raises CallerLimitError, QueueFullError, which say when to try again.
        """
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

    def bound_s(self, timeout_s: float | None) -> float:
        """The deadline of a request that asked for ``timeout_s``, or for none."""
        return min(self._limits.default_deadline_s if timeout_s is None else timeout_s, self._limits.max_deadline_s)

    def _refuse(self, what: str, key: str) -> None:
        raise QueueFullError(f"{what}, the most that limits.{key} allows", self.pace.drain_s())

    def _check_caller(self, caller: Caller) -> None:
        own = [live for request_id, live in self._live.items() if request_id.startswith(caller.own_id(""))]
        if caller.max_requests is not None and len(own) >= caller.max_requests:
            message = f"{caller.name} has {len(own)} requests in flight, the most that its max_requests allows"
            raise CallerLimitError(message, self.pace.drain_s())
        num_waiting = sum(live.replica_id is None for live in own)
        if caller.max_queued is not None and num_waiting >= caller.max_queued and not self._has_place():
            message = f"{caller.name} has {num_waiting} requests waiting, the most that its max_queued allows"
            raise CallerLimitError(message, self.pace.drain_s())
