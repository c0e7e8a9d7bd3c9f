"""A trace as Chrome and Perfetto read it (the Trace Event Format), and how ranks spent their time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from shardray.v1 import control_pb2


def join_parts(parts: Iterable[control_pb2.RankTrace]) -> list[control_pb2.RankTrace]:
    """One message a rank, in the order of (replica, rank)."""
    whole: dict[tuple[int, int], control_pb2.RankTrace] = {}
    for part in parts:
        known = whole.setdefault((part.replica_id, part.rank), part)
        if known is not part:
            known.spans.extend(part.spans)
    return [whole[place] for place in sorted(whole)]


def to_chrome(ranks: Sequence[control_pb2.RankTrace]) -> dict[str, Any]:
    """A process for each rank; times in microseconds from the first span on."""
    begin_ns = min((span.begin_ns for rank in ranks for span in rank.spans), default=0)
    events: list[dict[str, Any]] = []
    for index, rank in enumerate(ranks):
        for name, value in (("process_name", {"name": label(rank)}), ("process_sort_index", {"sort_index": index})):
            events.append({"ph": "M", "pid": index, "tid": 0, "name": name, "args": value})
        events += [
            {
                "ph": "X",
                "pid": index,
                "tid": 0,
                "cat": span.kind,
                "name": span.name,
                "ts": (span.begin_ns - begin_ns) / 1000,
                "dur": span.duration_ns / 1000,
            }
            for span in rank.spans
        ]
    notes = {label(rank): note for rank in ranks if (note := _note(rank))}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"source": "shardray trace", **notes}}


def label(rank: control_pb2.RankTrace) -> str:
    return f"replica {rank.replica_id} stage {rank.stage} tensor {rank.tp_rank} ({rank.host} pid {rank.pid})"


def _note(rank: control_pb2.RankTrace) -> str:
    notes = []
    if rank.clock_error_ns:
        notes.append(f"its clock is an estimate, right to {rank.clock_error_ns / 1e6:.3g} ms")
    if rank.num_dropped_spans:
        notes.append(f"{rank.num_dropped_spans} spans were too many and are missing")
    return "; ".join(notes)


def summary(rank: control_pb2.RankTrace) -> str:
    """How many steps there were, and what share of their time went into what."""
    spent_ns: dict[str, int] = defaultdict(int)
    for span in rank.spans:
        spent_ns[span.kind] += span.duration_ns
    num_steps = sum(span.kind == "step" for span in rank.spans)
    if not num_steps:
        return f"{label(rank)}: idle"
    steps_ns = spent_ns.pop("step")
    shares = ", ".join(f"{kind} {time_ns / steps_ns:.0%}" for kind, time_ns in sorted(spent_ns.items()))
    note = f" ({_note(rank)})" if _note(rank) else ""
    return f"{label(rank)}: {num_steps} steps of {steps_ns / num_steps / 1e6:.2f} ms{', ' * bool(shares)}{shares}{note}"
