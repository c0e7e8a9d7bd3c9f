"""Whose a request is.

Requests of named callers carry the name in their id. So one caller can neither resume, nor abort, nor collide with a
request of another, and what each has in flight can be counted, also after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

_SEPARATOR = "·"  # not ASCII, so neither a name nor an id that a client chose has it


@dataclass(frozen=True)
class Caller:
    """Whoever showed a token."""

    name: str
    max_requests: int | None = None  # in flight at once, running and waiting
    max_queued: int | None = None  # of these, waiting

    def own_id(self, request_id: str) -> str:
        """The id under which the driver knows a request of this caller."""
        return f"{self.name}{_SEPARATOR}{request_id}"


def caller_name(request_id: str) -> str:
    """Of whoever showed a token; else empty."""
    return request_id.partition(_SEPARATOR)[0] if _SEPARATOR in request_id else ""


def public_id(request_id: str) -> str:
    """The id that the caller chose."""
    return request_id.rpartition(_SEPARATOR)[2]
