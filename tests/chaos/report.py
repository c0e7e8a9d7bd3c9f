"""What a chaos run did and found: lines while it goes on, figures at its end."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.chaos.compare import Verdict


@dataclass(frozen=True)
class Figures:
    """A run in numbers; the run is good if ``problems`` is empty."""

    seed: int
    duration_s: float
    faults: dict[str, int]  # injected, by kind
    num_streams: int
    num_left: int  # by their clients, on purpose
    num_tokens: int
    num_lost: int
    num_changed: int
    recoveries_s: dict[str, list[float]]  # by cause: from the fault until the replica that it hit was ready again
    longest_pauses_s: list[float]  # of each stream
    problems: list[str]

    def lines(self) -> list[str]:
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return [
            f"seed {self.seed}, {self.duration_s:.0f} s: {sum(self.faults.values())} faults ({faults})",
            f"{self.num_streams} streams ({self.num_left} left by their clients), {self.num_tokens} tokens: "
            f"{self.num_lost} lost, {self.num_changed} changed",
            *(f"recovery from {cause}: {_spread(times_s)}" for cause, times_s in sorted(self.recoveries_s.items())),
            f"longest pause of a stream: {_spread(self.longest_pauses_s)}",
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]

    def as_json(self) -> dict[str, object]:
        figures = dataclasses.asdict(self)
        del figures["longest_pauses_s"]
        figures["worst_pause_s"] = max(self.longest_pauses_s, default=0.0)
        return figures


@dataclass
class Report:
    """Collects; use it in one asyncio loop."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    num_left: int = 0
    num_tokens: int = 0
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    longest_pauses_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        """One line, with the time since the run began."""
        print(f"{time.monotonic() - self.began_s:7.2f} s  {what}", flush=True)

    def fault(self, kind: str, detail: str) -> None:
        self.faults[kind] += 1
        self.say(f"{kind}: {detail}")

    def recovery(self, replica_id: int, cause: str, took_s: float) -> None:
        self.recoveries_s[cause].append(took_s)
        self.say(f"replica {replica_id} is ready again, {took_s:.2f} s after {cause}")

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.say(f"PROBLEM: {what}")

    def stream(self, name: str, verdict: Verdict, detail: str, num_tokens: int, pause_s: float, was_left: bool) -> None:
        self.verdicts[verdict] += 1
        self.num_left += was_left
        self.num_tokens += num_tokens
        self.longest_pauses_s.append(pause_s)
        if verdict is not Verdict.SAME:
            self.problem(f"stream {name} {verdict}: {detail}")

    def figures(self) -> Figures:
        return Figures(
            seed=self.seed,
            duration_s=time.monotonic() - self.began_s,
            faults=dict(self.faults),
            num_streams=self.verdicts.total(),
            num_left=self.num_left,
            num_tokens=self.num_tokens,
            num_lost=self.verdicts[Verdict.LOST],
            num_changed=self.verdicts[Verdict.CHANGED],
            recoveries_s=dict(self.recoveries_s),
            longest_pauses_s=self.longest_pauses_s,
            problems=self.problems,
        )


def _spread(values_s: list[float]) -> str:
    if not values_s:
        return "none"
    return f"median {statistics.median(values_s):.2f} s, worst {max(values_s):.2f} s of {len(values_s)}"
