"""Runs of several contestants in turn, and the referee's word on their tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.emitting import RESULTS_DIR, Emit
from benchmarks.harness import Harness, Options, Outputs, Task
from benchmarks.kinds import parse_label
from benchmarks.metrics import digest
from benchmarks.referee import BOUNDS, Verdict, judge, verdict_record
from benchmarks.suites import Heat, Suite
from benchmarks.workloads import MAIN, WORKLOADS, Workload, make_workload
from shardray.runtime.model.sources import resolve_model


@dataclass(frozen=True)
class RunSetup:
    """What all contestants of one invocation share."""

    model: str
    dtype: str
    num_threads: int
    num_rounds: int | None  # instead of what each heat has
    seed: int
    scale: float
    quiet_timeout_s: float
    run_timeout_s: float
    judges: bool
    run_id: str


def chosen_suite(labels: Sequence[str], workloads: Sequence[str]) -> Suite:
    """Every label on every workload. Raises ValueError naming what is not known."""
    for label in labels:
        parse_label(label)
    if unknown := sorted(set(workloads) - set(WORKLOADS)):
        raise ValueError(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    return Suite("as chosen", (Heat(((tuple(labels), tuple(workloads)),)),))


def run_suite(suite: Suite, setup: RunSetup, emit: Emit) -> bool:
    """Whether all went well. Raises ValueError for a model that cannot be had, or too many threads."""
    _use_cores(setup.num_threads)
    model_dir = resolve_model(setup.model)
    vocab_size = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    names = dict.fromkeys(name for _, workloads in suite.tasks for name in workloads)
    made = {name: make_workload(name, vocab_size, setup.seed, setup.scale) for name in names}
    harness = Harness(
        Options(
            model_dir=model_dir,
            dtype=setup.dtype,
            num_threads=setup.num_threads,
            quiet_timeout_s=setup.quiet_timeout_s,
            run_timeout_s=setup.run_timeout_s,
            log_dir=RESULTS_DIR / "logs" / setup.run_id,
        ),
        emit,
    )
    succeeded = True
    for heat, rounds in suite.numbered(setup.num_rounds):
        succeeded = harness.run(_tasks(heat, made), rounds) and succeeded
    return judge_outputs(harness.outputs, setup, model_dir, emit) and succeeded if setup.judges else succeeded


def _tasks(heat: Heat, made: dict[str, Workload]) -> list[Task]:
    return [
        Task(parse_label(label), [made[name] for name in workloads])
        for labels, workloads in heat.tasks
        for label in labels
    ]


def judge_outputs(outputs: Outputs, setup: RunSetup, model_dir: Path, emit: Emit) -> bool:
    """A record for each contestant and main workload; whether all agree. The same tokens are judged once."""
    agree = True
    if setup.dtype not in BOUNDS:
        return agree
    for workload in MAIN:
        seen: dict[str, Verdict] = {}
        for label, traces in outputs.by_workload.get(workload, {}).items():
            tokens = digest(traces)
            if tokens not in seen:
                pairs = list(zip(outputs.requests[workload], traces, strict=True))
                seen[tokens] = judge(model_dir, setup.dtype, setup.num_threads, pairs)
            agree = agree and seen[tokens].agrees
            whose = {"contestant": label, "workload": workload, "dtype": setup.dtype, "output_sha256": tokens}
            emit(whose | verdict_record(seen[tokens]))
    return agree


def _use_cores(num_cores: int) -> None:
    """Bind this process, and so all that it starts, to that many cores: every contestant gets the same ones."""
    available = sorted(os.sched_getaffinity(0))
    if num_cores > len(available):
        raise ValueError(f"--threads {num_cores}: this process may use {len(available)} cores")
    os.sched_setaffinity(0, available[:num_cores])
