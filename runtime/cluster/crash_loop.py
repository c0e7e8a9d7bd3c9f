"""When a mesh fails again and again: how long to wait before the next try, and when to give it up."""

from __future__ import annotations

_INFANCY_S = 5.0  # a mesh that ends sooner counts as one that could not be formed
_FIRST_BACK_OFF_S = 0.25
_MAX_BACK_OFF_S = 10.0


class CrashLoop:
    """Counts failures in a row. One alone is an accident, and is mended at once."""

    def __init__(self, max_failures: int) -> None:
        self.num_failures = 0
        self._max_failures = max_failures

    @property
    def is_hopeless(self) -> bool:
        return self.num_failures >= self._max_failures

    @property
    def back_off_s(self) -> float:
        """To wait before the next try: nothing after the first failure, then ever longer."""
        if self.num_failures < 2:
            return 0.0
        return min(_MAX_BACK_OFF_S, _FIRST_BACK_OFF_S * 2.0 ** (self.num_failures - 2))

    def note_end(self, lived_s: float) -> None:
        """A mesh that ran has ended; if it lived long enough, what failed before it is forgotten."""
        self.num_failures = self.num_failures + 1 if lived_s < _INFANCY_S else 0

    def note_failed_form(self) -> None:
        """A mesh could not be formed."""
        self.num_failures += 1

    def forget(self) -> None:
        """Begin anew."""
        self.num_failures = 0
