"""Requests that no replica has a place for yet: lower priority value first, then first come, first served."""

from __future__ import annotations

import heapq


class WaitingQueue:
    """Request ids in the order in which they will be dispatched."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._arrivals: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._arrivals)

    def push(self, request_id: str, priority: int, arrival: int) -> None:
        """``arrival`` counts requests; one that comes back takes its old place."""
        self._arrivals[request_id] = arrival
        heapq.heappush(self._heap, (priority, arrival, request_id))

    def pop(self) -> str:
        """The next request. Raises IndexError if none waits."""
        while True:
            _, arrival, request_id = heapq.heappop(self._heap)
            if self._arrivals.get(request_id) == arrival:
                del self._arrivals[request_id]
                return request_id

    def remove(self, request_id: str) -> None:
        """Take a request out, wherever it stands; an unknown id is ignored. Its place in the heap is skipped later."""
        self._arrivals.pop(request_id, None)
        if len(self._heap) > 2 * len(self._arrivals) + 64:
            self._heap = [item for item in self._heap if self._arrivals.get(item[2]) == item[1]]
            heapq.heapify(self._heap)
