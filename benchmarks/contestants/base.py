"""The process of a contestant: load, serve what the harness asks for, say how it went. Standard library only."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Protocol

from benchmarks import processes
from benchmarks.protocol import Ran, Ready, Request, Run, Setup, Trace, run_from, setup_from


class Contestant(Protocol):
    """A runtime with its model loaded."""

    details: dict[str, Any]

    def prepare(self, requests: list[Request]) -> None:
        """Whatever pays to do once for a workload; not measured."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        """Take each request when it is due, serve all as fast as the runtime can; one trace each, in their order."""

    def sample(self) -> dict[str, float]:
        """Figures of the engine as of now; asked for every SAMPLE_PERIOD_S while it serves. Empty if it has none."""

    def close(self) -> None:
        """Give everything back."""


SAMPLE_PERIOD_S = 0.25
_MOST_AT_ONCE = 16


def main(load: Callable[[Setup], Contestant]) -> None:
    """Answer the harness until its end of the pipe closes. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: Ready | Ran) -> None:
        print(json.dumps(asdict(message)), file=replies, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of ``close``, also in the middle of a run
    setup = setup_from(json.loads(sys.stdin.readline()))
    contestant = load(setup)
    try:
        first_token_s = contestant.serve([replace(setup.first, max_tokens=1)])[0].token_times_s[0]
        reply(Ready(first_token_s - setup.spawned_s, contestant.details))
        for line in sys.stdin:
            reply(run(contestant, run_from(json.loads(line))))
    finally:
        contestant.close()


def run(contestant: Contestant, run: Run) -> Ran:
    """Warm up, then serve as often as ``run`` says."""
    contestant.prepare(run.requests)
    contestant.serve(warm_up(run))
    gc.collect()
    tree = processes.process_tree(os.getpid())
    processes.forget_peaks(tree)
    cpu_s = processes.cpu_seconds(tree)
    with _sampling(contestant) as samples:
        passes = [contestant.serve(run.requests) for _ in range(run.num_passes)]
    tree = processes.process_tree(os.getpid())
    return Ran(
        passes=passes,
        cpu_s=processes.cpu_seconds(tree) - cpu_s,
        peak_rss_bytes=processes.peak_rss_bytes(tree),
        pss_bytes=processes.pss_bytes(tree),
        details=_medians(samples),
    )


def warm_up(run: Run) -> list[Request]:
    """The same shapes all at once, read backwards: what is kept of these prompts helps none of those that count."""
    requests = run.requests
    if any(item.arrival_s for item in requests):
        requests = requests[:_MOST_AT_ONCE]  # they are not meant to come together
    few = run.num_warmup_tokens
    return [Request(item.prompt_ids[::-1], min(item.max_tokens, few)) for item in requests]


@contextmanager
def _sampling(contestant: Contestant) -> Iterator[list[dict[str, float]]]:
    samples: list[dict[str, float]] = []
    done = threading.Event()

    def collect() -> None:
        while not done.wait(SAMPLE_PERIOD_S):
            if sample := contestant.sample():
                samples.append(sample)

    thread = threading.Thread(target=collect, name="sampling", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        if sample := contestant.sample():
            samples.append(sample)


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    names = samples[0] if samples else ()
    return {name: sorted(sample[name] for sample in samples)[len(samples) // 2] for name in names}


def now_s() -> float:
    return time.perf_counter()
