"""Who hears of every request, token and end: metrics, logs, traces. Without one, each costs an empty call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardray.runtime.driver.live import LiveRequest
    from shardray.runtime.engine.traced import TracedStep


class RequestObserver:
    """Called in the driver's loop, between tokens of all streams: be quick, and raise nothing."""

    def on_accept(self, live: LiveRequest) -> None:
        """A request was taken in, in the task that handles its call; or from the journal of an earlier driver.

        Whoever wants to know of its steps sets ``live.is_traced``.
        """

    def on_steps(self, live: LiveRequest, steps: Sequence[TracedStep]) -> None:
        """A replica tells of steps that a traced request took part in, before the token of the last one."""

    def on_token(self, live: LiveRequest) -> None:
        """A replica made a token; the entry does not have its time yet, if it is the first one."""

    def on_end(self, live: LiveRequest) -> None:
        """A request has ended, as ``live.stream.end`` says; ``live.replica_id`` is where it ran, if it did."""
