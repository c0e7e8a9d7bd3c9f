"""What one rank did, and when: written down only while somebody looks.

Nothing is asked in between: parts of a mesh get timed stand-ins for their methods, and lose them again.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable
from typing import Any

import msgspec

MAX_SPANS = 200_000  # some ten megabytes


class SpanKind(enum.StrEnum):
    """What the time went into."""

    STEP = "step"  # one plan, all that follows included
    COLLECTIVE = "collective"  # among tensor ranks, waiting for the slowest included
    HANDOVER = "hand-over"  # to the next stage
    BUBBLE = "bubble"  # waiting for the stage before


class Span(msgspec.Struct, frozen=True, array_like=True):
    """``begin_ns`` is on the machine's CLOCK_MONOTONIC, which all its processes share."""

    kind: SpanKind
    name: str
    begin_ns: int
    duration_ns: int


class Spans:
    """Spans of one thread, in the order of their ends; the first MAX_SPANS are kept."""

    def __init__(self) -> None:
        self.found: list[Span] = []
        self.num_dropped = 0
        self._undo = contextlib.ExitStack()

    def note(self, kind: SpanKind, name: str, begin_ns: int) -> None:
        """A span from ``begin_ns`` until now."""
        if len(self.found) < MAX_SPANS:
            self.found.append(Span(kind, name, begin_ns, time.monotonic_ns() - begin_ns))
        else:
            self.num_dropped += 1

    def attach(self, part: Any, method: str, kind: SpanKind, name: str) -> None:
        """Write down every call of ``part.method`` until ``detach``."""
        setattr(part, method, self._timed(getattr(part, method), kind, name))
        self._undo.callback(delattr, part, method)

    def detach(self) -> None:
        """Leave all parts as they were."""
        self._undo.close()

    def _timed(self, call: Callable[..., Any], kind: SpanKind, name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin_ns = time.monotonic_ns()
            try:
                return call(*arguments, **options)
            finally:
                self.note(kind, name, begin_ns)

        return timed
