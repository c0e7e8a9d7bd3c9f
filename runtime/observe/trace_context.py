"""The W3C trace context that a call came with, for whoever handles it to find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar

_KEYS = ("traceparent", "tracestate")
TRACE_CONTEXT: ContextVar[Mapping[str, str] | None] = ContextVar("trace_context", default=None)


def note_trace_context(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Take it from a call's metadata, into the context of the task that handles the call."""
    found = {key: value for key, value in metadata or () if key in _KEYS and isinstance(value, str)}
    if found:
        TRACE_CONTEXT.set(found)
