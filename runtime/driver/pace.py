"""How fast the queue has been draining, and so when a client that was refused should try again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_NUM_DEPARTURES = 64  # that the pace is taken from
_SHORTEST_S = 0.25
_LONGEST_S = 60.0


class QueuePace:
    """Departures over a clock that only runs while requests wait: an idle hour says nothing of the next rush."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_waiting = 0
        self._observed_s = clock()
        self._busy_s = 0.0
        self._departures = deque([0.0], maxlen=_NUM_DEPARTURES + 1)  # by the busy clock; the first one is its start

    def observe(self, num_waiting: int) -> None:
        """The queue's length, after whatever may have changed it: each of its changes by itself."""
        self._tick()
        self._departures.extend([self._busy_s] * (self._num_waiting - num_waiting))
        self._num_waiting = num_waiting

    def drain_s(self) -> float:
        """Seconds until all that wait now have left, at the pace of the last departures; in [0.25, 60].

        Before anything has left, the next departure is taken to be due now.
        """
        self._tick()
        num_departures = max(1, len(self._departures) - 1)
        drain_s = self._num_waiting * (self._busy_s - self._departures[0]) / num_departures
        return min(max(drain_s, _SHORTEST_S), _LONGEST_S)

    def _tick(self) -> None:
        now_s = self._clock()
        if self._num_waiting:
            self._busy_s += now_s - self._observed_s
        self._observed_s = now_s
