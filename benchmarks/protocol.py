"""What the harness and a contestant's process say to each other: JSON lines over the process's stdin and stdout.

Imports nothing outside the standard library: it also runs in the environments of the peers. Times are seconds of
``time.perf_counter``, which on Linux is one clock for all processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

INT8 = "int8"  # of weights; activations are bfloat16


@dataclass(frozen=True)
class Request:
    """One generation of exactly ``max_tokens`` tokens: an end-of-sequence id does not end it. Temperature 0 is greedy.

    It is handed over ``arrival_s`` after its pass began, whatever has become of the others by then.
    """

    prompt_ids: list[int]
    max_tokens: int
    arrival_s: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def total_len(self) -> int:
        return len(self.prompt_ids) + self.max_tokens


@dataclass
class Trace:
    """What became of one request: when it was due, and each token with the time the caller had it."""

    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    def add(self, token_ids: list[int], time_s: float) -> None:
        self.token_ids += token_ids
        self.token_times_s += [time_s] * len(token_ids)


@dataclass(frozen=True)
class Setup:
    """Sent once. ``options`` are those of the contestant's label; ``first`` is the request that ends the start-up."""

    model_dir: str
    dtype: str
    num_threads: int
    spawned_s: float
    first: Request
    max_num_seqs: int = 64  # the most requests that it will be handed at once
    max_model_len: int = 2048  # tokens of the longest of them, its output included
    options: dict[str, str] = field(default_factory=dict)

    @property
    def activations_dtype(self) -> str:
        return "bfloat16" if self.dtype == INT8 else self.dtype


@dataclass
class Ready:
    """The answer to Setup, sent once the first request has its first token."""

    startup_s: float  # from the start of the process to that token
    details: dict[str, Any]  # versions, and what the contestant chose


@dataclass(frozen=True)
class Run:
    """Serve all of ``requests`` ``num_passes`` times, after a short warm-up in the same shapes with other tokens."""

    requests: list[Request]
    num_passes: int
    num_warmup_tokens: int = 4


@dataclass
class Ran:
    """The answer to Run."""

    passes: list[list[Trace]]  # in the order of the requests
    cpu_s: float  # of the process and its descendants, in the passes
    peak_rss_bytes: int  # sum over them of each one's own peak in the passes; shared pages count in each
    pss_bytes: int  # sum over them at the end; shared pages count once
    details: dict[str, Any]  # of the engine, in the passes


def request_from(fields: dict[str, Any]) -> Request:
    return Request(**fields)


def setup_from(fields: dict[str, Any]) -> Setup:
    return Setup(**{**fields, "first": request_from(fields["first"])})


def run_from(fields: dict[str, Any]) -> Run:
    return Run(**{**fields, "requests": [request_from(request) for request in fields["requests"]]})


def ran_from(fields: dict[str, Any]) -> Ran:
    passes = [[Trace(**trace) for trace in traces] for traces in fields["passes"]]
    return Ran(**{**fields, "passes": passes})
