"""What shardray is meant to reach: ratios between contestants of one round, and figures of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What was measured of a target: a value a round, and the rival that it was held against, if any."""

    values: list[float]
    rival: str = ""

    @property
    def middle(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Ratio:
    """``metric`` of ``contestant`` over that of the best of ``rivals`` (the best peer, if there are none named)."""

    what: str
    workload: str
    metric: str
    contestant: str
    rivals: tuple[str, ...]
    limit: float
    lower_is_better: bool = False  # then the ratio is the other way round: above 1 is better still
    unit: str = "×"
    at_most = False

    def read(self, records: Sequence[Record]) -> Reading:
        """A ratio for each round in which the contestant and its strongest rival took part."""
        mine = [one for one in records if one["kind"] == "run" and one["workload"] == self.workload]
        by_rival = {label: _values(mine, label, self.metric) for label in self._rivals(mine)}
        if not by_rival:
            return Reading([])
        choose = min if self.lower_is_better else max
        best = choose(by_rival, key=lambda label: statistics.median(by_rival[label].values()))
        own = _values(mine, self.contestant, self.metric)
        ratios = []
        for number in sorted(own.keys() & by_rival[best].keys()):
            against = choose(values[number] for values in by_rival.values() if number in values)
            ratios.append(against / own[number] if self.lower_is_better else own[number] / against)
        return Reading(ratios, best)

    def _rivals(self, records: Sequence[Record]) -> list[str]:
        labels = dict.fromkeys(one["contestant"] for one in records if one["is_peer"] or self.rivals)
        return [label for label in labels if not self.rivals or label in self.rivals]


@dataclass(frozen=True)
class Bound:
    """A figure of one contestant, or of the fleet (``kind`` of the record, and no workload)."""

    what: str
    workload: str
    contestant: str
    value: Callable[[Record], float | None]
    limit: float
    unit: str = ""
    at_most: bool = True
    kind: str = "run"

    def read(self, records: Sequence[Record]) -> Reading:
        own = [one for one in records if one["kind"] == self.kind and one.get("workload", "") == self.workload]
        values = [self.value(one) for one in own if one.get("contestant", "") == self.contestant]
        return Reading([value for value in values if value is not None])


Target = Ratio | Bound


def is_reached(target: Target, value: float) -> bool:
    return value <= target.limit if target.at_most else value >= target.limit


def _values(records: Sequence[Record], label: str, metric: str) -> dict[tuple[str, int], float]:
    """By invocation and round: another invocation may count its rounds from the same number."""
    return {(one["run_id"], one["round"]): one[metric] for one in records if one["contestant"] == label}


def _field(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
    return lambda record: None if record.get(name) is None else factor * float(record[name])


def _of_floor(record: Record) -> float | None:
    """By reads measured just before: the machine has faster and slower minutes."""
    return 100 * float(record["decode_tok_s"]) / float(record["machine"]["floor_tok_s"])


def _p99_over_p50(record: Record) -> float | None:
    return float(record["watched_itl_p99_s"]) / float(record["watched_itl_p50_s"])


def _control_ms(record: Record) -> float | None:
    seconds = record["engine"].get("control_s_per_step")
    return None if seconds is None else 1e3 * float(seconds)


_TP2, _PP2, _ONE = "shardray:tp=2,threads=1", "shardray:pp=2,threads=1", "shardray:threads=1"
_DECODE, _OUTPUT = "decode_tok_s", "output_tok_s"

TARGETS: tuple[Target, ...] = (
    Ratio("one stream, over the best peer", "single", _DECODE, "shardray", (), 1.15),
    Bound("one stream, of the floor", "single", "shardray", _of_floor, 70, " %", at_most=False),
    Ratio("32 streams, over the best peer", "concurrent", _OUTPUT, "shardray", (), 1.4),
    Ratio("mixed lengths, over the best peer", "mixed", _OUTPUT, "shardray", (), 1.4),
    Ratio("first token of 128, the best peer's over ours", "single", "ttft_s", "shardray", (), 1.0, True),
    Ratio("first token of 2,048, the best peer's over ours", "prompt-2048", "ttft_s", "shardray", (), 1.0, True),
    Bound("running decodes while long prompts arrive, p99 over p50", "long-prompts", "shardray", _p99_over_p50, 3, "×"),
    Ratio("2 tensor ranks over 1, one stream", "single", _DECODE, _TP2, (_ONE,), 1.8),
    Ratio("2 tensor ranks over 1, 32 streams", "concurrent", _OUTPUT, _TP2, (_ONE,), 1.8),
    Ratio("2 stages over 1, 32 streams", "concurrent", _OUTPUT, _PP2, (_ONE,), 1.8),
    Ratio("2 tensor ranks over 1 process of 2 threads, one stream", "single", _DECODE, _TP2, ("shardray",), 0.95),
    Ratio("2 tensor ranks over 1 process of 2 threads, 32", "concurrent", _OUTPUT, _TP2, ("shardray",), 0.95),
    Ratio("gRPC over in process, one stream", "single", _DECODE, "served", ("shardray",), 0.97),
    Ratio("gRPC over in process, 32 streams", "concurrent", _OUTPUT, "served", ("shardray",), 0.97),
    Bound("scheduler and control a step, 32 streams", "concurrent", "shardray", _control_ms, 0.3, " ms"),
    Bound("scheduler and control a step, 256 streams", "batch-256", "shardray", _control_ms, 1.0, " ms"),
    Bound("idle fleet, of a core", "", "", _field("idle_cores", 100), 1.0, " %", kind="fleet"),
    Bound("serve to first token, Ray started too", "", "local", _field("first_token_s"), 8.0, " s", kind="serve"),
    Bound("serve to first token, on a running Ray", "", "running", _field("first_token_s"), 4.0, " s", kind="serve"),
    Bound("memory of a host over weights and KV", "", "", _field("most_over_bytes", 2**-20), 450, " MiB", kind="fleet"),
)
