"""Whether a request is taken, and how long it may take: what is known before it is anyone's turn."""

from __future__ import annotations

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.errors import QueueFullError, UnavailableError
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.pace import QueuePace
from shardray.runtime.engine.request import ServedModel


class Admission:
    """The door. It may be closed for good."""

    def __init__(self, limits: LimitsSettings, fleet: Fleet) -> None:
        self.pace = QueuePace()  # of the requests that wait
        self._limits = limits
        self._fleet = fleet
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

    def check_queue(self, num_waiting: int) -> None:
        """For a request that has to wait. Raises QueueFullError, which says when to try again."""
        if num_waiting >= self._limits.max_queued_requests:
            message = f"{num_waiting} requests are waiting, the most that limits.max_queued_requests allows"
            raise QueueFullError(message, self.pace.drain_s())

    def bound_s(self, timeout_s: float | None) -> float:
        """The deadline of a request that asked for ``timeout_s``, or for none."""
        return min(self._limits.default_deadline_s if timeout_s is None else timeout_s, self._limits.max_deadline_s)
