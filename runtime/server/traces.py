"""Traces as messages, in parts that any client takes."""

from __future__ import annotations

from collections.abc import Iterator

from shardray.runtime.cluster.trace import RankTrace
from shardray.runtime.engine.request import FieldError
from shardray.v1 import control_pb2

_MAX_SECONDS = 60.0
_SPANS_A_MESSAGE = 20_000  # about one of the four megabytes that a gRPC client takes


def check_seconds(seconds: float) -> float:
    """Raises FieldError."""
    if not 0.0 < seconds <= _MAX_SECONDS:
        raise FieldError("seconds", f"{seconds:g} is outside (0, {_MAX_SECONDS:g}]")
    return seconds


def trace_to_proto(trace: RankTrace) -> Iterator[control_pb2.RankTrace]:
    """At least one message, so that a rank that did nothing is there as well."""
    for first in range(0, max(1, len(trace.spans)), _SPANS_A_MESSAGE):
        yield control_pb2.RankTrace(
            replica_id=trace.replica_id,
            rank=trace.rank,
            stage=trace.stage,
            tp_rank=trace.tp_rank,
            host=trace.host,
            pid=trace.pid,
            clock_error_ns=trace.clock_error_ns,
            num_dropped_spans=trace.num_dropped,
            spans=[
                control_pb2.Span(kind=span.kind, name=span.name, begin_ns=span.begin_ns, duration_ns=span.duration_ns)
                for span in trace.spans[first : first + _SPANS_A_MESSAGE]
            ],
        )
