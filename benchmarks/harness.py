"""Rounds: every contestant in turn, each in a process of its own, and again, so that drift falls on all alike."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.gguf_writing import gguf_of
from benchmarks.kinds import PEERS_DIR, Contestant
from benchmarks.machine import BUSY_CORES, Machine, OthersMeter, wait_until_quiet
from benchmarks.metrics import PassFigures, agreement, digest, pass_figures
from benchmarks.protocol import Ran, Ready, Run, Setup, Trace
from benchmarks.worker import ContestantError, Worker, start_worker
from benchmarks.workloads import Workload

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """One invocation. ``num_threads`` is each contestant's, unless its label says otherwise."""

    model_dir: Path
    dtype: str
    num_threads: int
    num_rounds: int
    scale: float
    quiet_timeout_s: float
    run_timeout_s: float
    log_dir: Path


def run_rounds(
    options: Options,
    machine: Machine,
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    emit: Callable[[Record], None],
) -> None:
    """Emit a record for each round, contestant and workload; one with ``error`` for what failed."""
    reference: dict[str, list[Trace]] = {}  # by workload: what the first contestant to run it said
    for round_number in range(options.num_rounds):
        for contestant in contestants:
            head = _head(options, machine, contestant, round_number)
            try:
                for record in _run_contestant(options, contestant, workloads, reference):
                    emit(head | record)
            except (ContestantError, ValueError) as error:
                emit(head | {"error": str(error)})


def _run_contestant(
    options: Options, contestant: Contestant, workloads: Sequence[Workload], reference: dict[str, list[Trace]]
) -> Iterator[Record]:
    python = contestant.kind.python()
    if python is None:
        variable = contestant.kind.environment_variable
        raise ContestantError(f"{contestant.label} has no environment: make bench-peers, or set {variable}")
    with start_worker(contestant, python, _log_path(options, contestant), options.run_timeout_s) as worker:
        quiet_cores = wait_until_quiet(options.quiet_timeout_s)
        ready = worker.load(_setup(options, contestant, workloads[0]))
        for workload in workloads:
            record = {"workload": workload.name, "startup_s": ready.startup_s, **ready.details}
            yield record | _run_workload(options, worker, workload, reference)
