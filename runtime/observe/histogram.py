"""A histogram that is filled between tokens: one bisection and two additions.

The one of ``prometheus_client`` takes ten times as long (a lock and a loop over its buckets), and is only needed for
what a scrape reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts values by the first bound that is not below them. For one thread; another may have a copy."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)  # ascending
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above every bound
        self.total = 0.0  # sum of the values

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        copied = Histogram(self.bounds)
        copied.counts, copied.total = self.counts.copy(), self.total
        return copied

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values up to it), as Prometheus writes buckets; ends with ``+Inf``."""
        names = (*map(str, map(float, self.bounds)), "+Inf")
        return list(zip(names, accumulate(self.counts), strict=True))
