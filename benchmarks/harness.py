"""Rounds: every contestant in turn, each in a process of its own, and again, so that drift falls on all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
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
        self._peers: dict[str, dict[str, Record]] = {}  # by workload and label: figures of their first round
        self.outputs = Outputs()

    def run(self, tasks: Sequence[Task], rounds: Sequence[int]) -> bool:
        """Whether all went well. ``rounds``: their numbers."""
        num_failed = 0
        for round_number in rounds:
            wait_until_quiet(self._options.quiet_timeout_s)
            machine = measure_machine(self._options.num_threads)
            limits = {"machine": asdict(machine) | {"floor_tok_s": machine.floor_tok_s(self._weight_bytes)}}
            for task in tasks:
                workloads = [one for one in task.workloads if self._takes_part(task.contestant, one)]
                if not workloads:
                    continue
                head = limits | self._head(task.contestant, round_number)
                try:
                    for record in self._run_contestant(task.contestant, workloads):
                        self._emit(head | record)
                except (ContestantError, ValueError) as error:
                    num_failed += 1
                    self._emit(head | {"error": str(error)})
        return num_failed == 0

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

    def _run_contestant(self, contestant: Contestant, workloads: Sequence[Workload]) -> Iterator[Record]:
        python = contestant.kind.python()
        if python is None:
            variable = contestant.kind.environment_variable
            raise ContestantError(f"{contestant.label} has no environment: make bench-peers, or set {variable}")
        options = options_for(contestant, python, self._options.model_dir, self._options.dtype)
        log_path = self._options.log_dir / f"{contestant.label.replace(':', '-')}.log"
        wait_until_quiet(self._options.quiet_timeout_s)
        meter = OthersMeter()
        with start_worker(contestant, python, log_path, self._options.run_timeout_s) as worker:
            ready = worker.load(self._setup(contestant, workloads, options, worker.spawned_s))
            common: Record = {"startup_s": ready.startup_s, "startup_busy": meter.cores() > BUSY_CORES}
            common["runtime"] = ready.details
            for workload in workloads:
                yield common | self._run_workload(contestant, worker, workload)

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

    def _run_workload(self, contestant: Contestant, worker: Worker, workload: Workload) -> Record:
        others_before = wait_until_quiet(self._options.quiet_timeout_s)
        meter = OthersMeter()
        ran = worker.run(Run(list(workload.requests), workload.num_passes))
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

    def _head(self, contestant: Contestant, round_number: int) -> Record:
        return {
            "kind": "run",
            "contestant": contestant.label,
            "is_peer": contestant.kind.is_peer,
            "round": round_number,
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
