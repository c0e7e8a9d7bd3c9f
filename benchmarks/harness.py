"""Rounds: every contestant in turn, each in a process of its own, and again, so that drift falls on all alike.

All of them are loaded before the first has its turn, and idle while another has its own: a machine that is shared
changes its speed within minutes, and what is compared has to be seconds apart.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.converted import options_for
from benchmarks.kinds import Contestant
from benchmarks.machine import BUSY_CORES, OthersMeter, measure_machine, wait_until_quiet
from benchmarks.metrics import PassFigures, agreement, digest, goodput_figures, pass_figures, watched_figures
from benchmarks.protocol import Ran, Request, Run, Setup, Trace
from benchmarks.worker import ContestantError, Worker, start_worker
from benchmarks.workloads import Workload

Record = dict[str, Any]
SITS_OUT = 0.6  # of the best peer's figure


@dataclass(frozen=True)
class Options:
    """What all runs of one invocation share. ``num_threads`` is each contestant's, unless its label says otherwise."""

    model_dir: Path
    dtype: str
    num_threads: int
    quiet_timeout_s: float
    run_timeout_s: float
    log_dir: Path


@dataclass(frozen=True)
class Task:
    """A contestant, and the workloads that it serves in one go."""

    contestant: Contestant
    workloads: Sequence[Workload]


@dataclass
class _Loaded:
    """A contestant whose process waits for its turn."""

    task: Task
    worker: Worker
    startup: Record
    failed: bool = False


@dataclass
class Outputs:
    """Tokens that came out, once for each contestant and workload."""

    by_workload: dict[str, dict[str, list[Trace]]] = field(default_factory=dict)
    requests: dict[str, Sequence[Request]] = field(default_factory=dict)

    def add(self, label: str, workload: Workload, traces: list[Trace]) -> Record:
        """How far these agree with those of the first contestant."""
        self.requests[workload.name] = workload.requests
        labels = self.by_workload.setdefault(workload.name, {})
        labels.setdefault(label, traces)
        reference_label, reference = next(iter(labels.items()))
        return {"with": reference_label, **agreement(traces, reference)}


class Harness:
    """Runs tasks. ``emit`` gets a record a run; one with ``error`` for what failed. ``outputs`` is for a referee."""

    def __init__(self, options: Options, emit: Callable[[Record], None]) -> None:
        self._options = options
        self._emit = emit
        self._weight_bytes = sum(file.stat().st_size for file in options.model_dir.glob("*.safetensors"))
        self._num_failed = 0
        self._peers: dict[str, dict[str, Record]] = {}  # by workload and label: figures of their first round
        self.outputs = Outputs()

    def run(self, tasks: Sequence[Task], rounds: Sequence[int]) -> bool:
        """Whether all went well. ``rounds``: their numbers."""
        self._num_failed = 0
        with contextlib.ExitStack() as workers:
            present = [one for task in tasks if (one := self._load(task, workers)) is not None]
            for workload in {one.name: one for task in tasks for one in task.workloads}.values():
                for number in rounds:
                    self._round(number, workload, [one for one in present if workload in one.task.workloads])
        return self._num_failed == 0

    def _round(self, number: int, workload: Workload, present: Sequence[_Loaded]) -> None:
        taking_part = [one for one in present if not one.failed and self._takes_part(one.task.contestant, workload)]
        if not taking_part:
            return
        wait_until_quiet(self._options.quiet_timeout_s)
        machine = measure_machine(self._options.num_threads)
        limits = {"machine": asdict(machine) | {"floor_tok_s": machine.floor_tok_s(self._weight_bytes)}}
        for one in taking_part:
            head = limits | self._head(one.task.contestant) | {"round": number}
            try:
                self._emit(head | one.startup | self._run_workload(one, workload))
            except (ContestantError, ValueError) as error:
                one.failed = True
                self._fail(head, error)

    def _fail(self, head: Record, error: Exception) -> None:
        self._num_failed += 1
        self._emit(head | {"error": str(error)})

    def _takes_part(self, contestant: Contestant, workload: Workload) -> bool:
        """A peer that fell far behind the best in rate and in time to first token is spared the further rounds."""
        if workload.needs_arrivals and not contestant.kind.takes_arrivals:
            return False
        peers = self._peers.get(workload.name, {})
        if (own := peers.get(contestant.label)) is None:
            return True
        is_slow = own["output_tok_s"] < SITS_OUT * max(peer["output_tok_s"] for peer in peers.values())
        is_late = SITS_OUT * own["ttft_s"] > min(peer["ttft_s"] for peer in peers.values())
        return not (is_slow and is_late)

    def _load(self, task: Task, workers: contextlib.ExitStack) -> _Loaded | None:
        """None for one that fails to."""
        try:
            return self._start(task, workers)
        except (ContestantError, ValueError) as error:
            self._fail(self._head(task.contestant), error)
            return None

    def _start(self, task: Task, workers: contextlib.ExitStack) -> _Loaded:
        contestant, python = task.contestant, task.contestant.kind.python()
        if python is None:
            variable = contestant.kind.environment_variable
            raise ContestantError(f"{contestant.label} has no environment: make bench-peers, or set {variable}")
        options = options_for(contestant, python, self._options.model_dir, self._options.dtype)
        log_path = self._options.log_dir / f"{contestant.label.replace(':', '-')}.log"
        wait_until_quiet(self._options.quiet_timeout_s)
        worker = workers.enter_context(start_worker(contestant, python, log_path, self._options.run_timeout_s))
        meter = OthersMeter([worker.pid])
        ready = worker.load(self._setup(contestant, task.workloads, options, worker.spawned_s))
        busy = meter.cores() > BUSY_CORES
        startup = {"startup_s": ready.startup_s, "startup_busy": busy, "runtime": ready.details}
        return _Loaded(task, worker, startup)

    def _setup(
        self, contestant: Contestant, workloads: Sequence[Workload], options: dict[str, str], spawned_s: float
    ) -> Setup:
        return Setup(
            model_dir=str(self._options.model_dir),
            dtype=self._options.dtype,
            num_threads=contestant.num_threads(self._options.num_threads),
            spawned_s=spawned_s,
            first=workloads[0].requests[0],
            max_num_seqs=max(len(workload.requests) for workload in workloads),
            max_model_len=max(workload.max_model_len for workload in workloads),
            options=options,
        )

    def _run_workload(self, one: _Loaded, workload: Workload) -> Record:
        contestant = one.task.contestant
        others_before = wait_until_quiet(self._options.quiet_timeout_s)
        meter = OthersMeter([one.worker.pid])
        ran = one.worker.run(Run(list(workload.requests), workload.num_passes))
        others_during = meter.cores()
        figures = figures_of(ran, workload)
        if contestant.kind.is_peer:
            self._peers.setdefault(workload.name, {}).setdefault(contestant.label, figures)
        return {
            "workload": workload.name,
            **figures,
            "output_sha256": digest(ran.passes[0]),
            "agreement": self.outputs.add(contestant.label, workload, ran.passes[0]),
            "others_cores_before": others_before,
            "others_cores_during": others_during,
            "busy": max(others_before, others_during) > BUSY_CORES,
        }

    def _head(self, contestant: Contestant) -> Record:
        return {
            "kind": "run",
            "contestant": contestant.label,
            "is_peer": contestant.kind.is_peer,
            "model": self._options.model_dir.name,
            "dtype": self._options.dtype,
            "num_threads": contestant.num_threads(self._options.num_threads),
            "weight_bytes": self._weight_bytes,
        }


def figures_of(ran: Ran, workload: Workload) -> Record:
    """Medians over the passes. Raises ContestantError where tokens are missing."""
    num_prompt_tokens = sum(len(request.prompt_ids) for request in workload.requests)
    num_output_tokens = sum(request.max_tokens for request in workload.requests)
    for traces in ran.passes:
        got = [len(trace.token_ids) for trace in traces]
        if got != [request.max_tokens for request in workload.requests]:
            raise ContestantError(f"{workload.name}: gave {sum(got)} tokens where {num_output_tokens} were asked for")
    passes = [pass_figures(traces, num_prompt_tokens) for traces in ran.passes]
    return {
        "num_requests": len(workload.requests),
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "num_passes": len(passes),
        **{item.name: statistics.median(getattr(one, item.name) for one in passes) for item in fields(PassFigures)},
        **watched_figures(ran.passes[0], workload.num_watched),
        **(goodput_figures(ran.passes[0]) if workload.needs_arrivals and not workload.num_watched else {}),
        "cpu_s_per_token": ran.cpu_s / (len(passes) * num_output_tokens),
        "peak_rss_bytes": ran.peak_rss_bytes,
        "pss_bytes": ran.pss_bytes,
        "engine": ran.details,
    }
