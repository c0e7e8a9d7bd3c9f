"""Finds the request that breaks meshes: a suspect runs alone until it has made progress, or has broken them alone.

A request is suspected once meshes in a row broke before it made progress. One trial at a time, on a replica that runs
nothing else.
"""

from __future__ import annotations

from collections import deque

from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.queue import WaitingQueue

_MAX_FAILED_TRIALS = 2  # one may be an accident of the moment


class Trials:
    """Who is suspected, and who is being tried."""

    def __init__(self) -> None:
        self.current: LiveRequest | None = None
        self._suspects: deque[LiveRequest] = deque()

    @property
    def is_due(self) -> bool:
        """Whether a suspect waits and none is being tried."""
        return self.current is None and bool(self._suspects)

    def occupies(self, replica_id: int) -> bool:
        """Whether a replica must get nothing else."""
        return self.current is not None and self.current.replica_id == replica_id

    def judge(self, lost: list[LiveRequest], waiting: WaitingQueue) -> LiveRequest | None:
        """A mesh broke under these requests, which wait now: one of them may be why.

        Suspects are taken out of the queue. Returns a request that is convicted.
        """
        if self.current in lost:
            suspect = self.current
            waiting.remove(suspect.request_id)
            return suspect if self._fail() else None
        for live in lost:
            live.strike()
            if live.is_suspect:
                waiting.remove(live.request_id)
                self._suspects.append(live)
        return None

    def begin(self) -> LiveRequest:
        """The next suspect, to be dispatched alone."""
        self.current = self._suspects.popleft()
        return self.current

    def interrupt(self) -> None:
        """The current trial has to be made again."""
        if self.current is not None:
            self._suspects.appendleft(self.current)
            self.current = None

    def acquit(self) -> None:
        """The current request went on alone."""
        assert self.current is not None
        self.current.clear()
        self.current = None

    def _fail(self) -> bool:
        """Whether the current trial convicts the request. If not, it is tried again."""
        live, self.current = self.current, None
        assert live is not None
        live.num_failed_trials += 1
        if live.num_failed_trials < _MAX_FAILED_TRIALS:
            self._suspects.appendleft(live)
            return False
        return True

    def forget(self, live: LiveRequest) -> None:
        """A request has ended."""
        if live is self.current:
            self.current = None
        elif live in self._suspects:
            self._suspects.remove(live)
