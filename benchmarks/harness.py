"""Rounds: every contestant in turn, each in a process of its own, and again, so that drift falls on all alike."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.kinds import PEERS_DIR, Contestant
from benchmarks.machine import BUSY_CORES, Machine, OthersMeter, wait_until_quiet
from benchmarks.metrics import PassFigures, agreement, digest, pass_figures
from benchmarks.protocol import Ran, Run, Setup, Trace
from benchmarks.worker import ContestantError, Worker, start_worker
from benchmarks.workloads import Workload

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What all runs of one invocation share. ``num_threads`` is each contestant's, unless its label says otherwise."""

    model_dir: Path
    dtype: str
    num_threads: int
    num_rounds: int
    quiet_timeout_s: float
    run_timeout_s: float
    log_dir: Path


class Harness:
    """Runs contestants over workloads. ``emit`` gets a record a run; one with ``error`` for what failed."""

    def __init__(
        self, options: Options, machine: Machine, workloads: Sequence[Workload], emit: Callable[[Record], None]
    ) -> None:
        self._options = options
        self._workloads = workloads
        self._emit = emit
        self._weight_bytes = sum(file.stat().st_size for file in options.model_dir.glob("*.safetensors"))
        self._machine = asdict(machine) | {"floor_tok_s": machine.floor_tok_s(self._weight_bytes)}
        self._reference: dict[str, tuple[str, list[Trace]]] = {}  # by workload: who ran it first, and what came out

    def run(self, contestants: Sequence[Contestant]) -> bool:
        """Whether all went well."""
        num_failed = 0
        for round_number in range(self._options.num_rounds):
            for contestant in contestants:
                head = self._head(contestant, round_number)
                try:
                    for record in self._run_contestant(contestant):
                        self._emit(head | record)
                except (ContestantError, ValueError) as error:
                    num_failed += 1
                    self._emit(head | {"error": str(error)})
        return num_failed == 0

    def _run_contestant(self, contestant: Contestant) -> Iterator[Record]:
        python = contestant.kind.python()
        if python is None:
            variable = contestant.kind.environment_variable
            raise ContestantError(f"{contestant.label} has no environment: make bench-peers, or set {variable}")
        options = _kind_options(self._options, contestant)
        log_path = self._options.log_dir / f"{contestant.label.replace(':', '-')}.log"
        wait_until_quiet(self._options.quiet_timeout_s)
        meter = OthersMeter()
        with start_worker(contestant, python, log_path, self._options.run_timeout_s) as worker:
            ready = worker.load(
                Setup(
                    model_dir=str(self._options.model_dir),
                    dtype=self._options.dtype,
                    num_threads=contestant.num_threads(self._options.num_threads),
                    spawned_s=worker.spawned_s,
                    first=self._workloads[0].requests[0],
                    options=options,
                )
            )
            startup = {"startup_s": ready.startup_s, "startup_busy": meter.cores() > BUSY_CORES}
            for workload in self._workloads:
                yield startup | {"runtime": ready.details} | self._run_workload(contestant, worker, workload)

    def _run_workload(self, contestant: Contestant, worker: Worker, workload: Workload) -> Record:
        others_before = wait_until_quiet(self._options.quiet_timeout_s)
        meter = OthersMeter()
        ran = worker.run(Run(list(workload.requests), workload.num_passes))
        others_during = meter.cores()
        reference_label, reference = self._reference.setdefault(workload.name, (contestant.label, ran.passes[0]))
        return {
            "workload": workload.name,
            **_figures(ran, workload),
            "output_sha256": digest(ran.passes[0]),
            "agreement": {"with": reference_label, **agreement(ran.passes[0], reference)},
            "others_cores_before": others_before,
            "others_cores_during": others_during,
            "busy": max(others_before, others_during) > BUSY_CORES,
        }

    def _head(self, contestant: Contestant, round_number: int) -> Record:
        return {
            "contestant": contestant.label,
            "round": round_number,
            "model": self._options.model_dir.name,
            "dtype": self._options.dtype,
            "num_threads": contestant.num_threads(self._options.num_threads),
            "weight_bytes": self._weight_bytes,
            "machine": self._machine,
        }


def _figures(ran: Ran, workload: Workload) -> Record:
    """Medians over the passes."""
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
        "cpu_s_per_token": ran.cpu_s / (len(passes) * num_output_tokens),
        "peak_rss_bytes": ran.peak_rss_bytes,
        "pss_bytes": ran.pss_bytes,
        "engine": ran.details,
    }


def _kind_options(options: Options, contestant: Contestant) -> dict[str, str]:
    """What the contestant gets told beside its label's options."""
    if contestant.kind.name != "llama.cpp":
        return contestant.options
    from benchmarks.gguf_writing import gguf_of

    dtype = contestant.options.get("dtype", options.dtype)
    print(f"GGUF file for {contestant.label} in {dtype} ...", file=sys.stderr)
    return contestant.options | {"gguf": str(gguf_of(options.model_dir, dtype, PEERS_DIR / "gguf"))}
