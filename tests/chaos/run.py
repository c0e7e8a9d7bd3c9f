"""One chaos run: the undisturbed answers, then the load with faults, then the peace after it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shardray.runtime.client import AsyncClient
from tests.chaos.cases import Case, draw_cases, with_stop
from tests.chaos.compare import Answer
from tests.chaos.faults import SHAPES, Faults
from tests.chaos.health import FleetView
from tests.chaos.load import Load, ask_all
from tests.chaos.report import Figures, Report
from tests.chaos.served import Served

_TP_SIZE = 2  # to begin with
_LAST_STREAMS_S = 120.0
_LOG_LINES = 60  # of a run with problems


@dataclass(frozen=True)
class Options:
    """A run; the same options make the same requests and draw the same faults."""

    seed: int
    duration_s: float  # of the faults
    model: str  # as model.source
    pace_s: float = 4.0  # between two faults on average
    num_cases: int = 24
    num_clients: int = 6
    spares: int = 1
    dtype: str = "float32"
    log: Path | None = None  # where the server's words go

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """That give the same tokens: in 16 bits those with as many tensor ranks."""
        return [shape for shape in SHAPES if self.dtype == "float32" or shape[0] == _TP_SIZE]

    @property
    def settings(self) -> list[str]:
        return [
            f"model.source={self.model}",
            f"model.dtype={self.dtype}",
            "model.max_model_len=1024",
            f"parallel.tensor_parallel_size={_TP_SIZE}",
            "engine.kv_memory_bytes=48MiB",
            "engine.max_num_seqs=4",  # fewer than clients: some requests wait
            "engine.max_num_batched_tokens=128",  # long prompts take several steps
            "engine.max_draft_tokens=7",  # tokens come several at a time
            "engine.step_timeout_s=3",
            "ray.form_timeout_s=60",
            "grpc.listen=127.0.0.1:0",
            f"cluster.spares={self.spares}",
            "cluster.max_failed_forms=1000",  # no crash loop: every failure here has its own cause
        ]


def run(options: Options) -> Figures:
    """The figures; what was wrong is in their ``problems``, and printed as it is found."""
    report = Report(options.seed)
    report.say(f"seed {options.seed}: {options.duration_s:g} s of faults, {options.model}")
    with _serving(options, report) as served:
        report.say(f"serving on {served.address}")
        asyncio.run(_disturb(served, options, report))
        report.say("stopping")
    return report.figures()


@contextlib.contextmanager
def _serving(options: Options, report: Report) -> Iterator[Served]:
    served = Served(options.settings)
    try:
        yield served
    finally:
        for wrong in (*served.stop(), *served.complaints()):
            report.problem(wrong)
        if options.log is not None:
            options.log.write_text("\n".join(served.stderr), encoding="utf-8")
        if report.problems:
            print("\n".join(["the server's last words:", *served.stderr[-_LOG_LINES:]]), flush=True)


async def _disturb(served: Served, options: Options, report: Report) -> None:
    async with AsyncClient(served.address) as client:
        expected = await _undisturbed(client, options)
        num_tokens = sum(len(answer.token_ids) for answer in expected.values())
        report.say(f"{len(expected)} requests answered undisturbed, {num_tokens} tokens")
        view = FleetView(client, report)
        load = Load(served.address, expected, options.num_clients, options.seed, report)
        faults = Faults(served, client, view, options.seed, options.pace_s, report, options.shapes)
        await faults.inject(options.duration_s)
        report.say("no more faults")
        await load.stop(_LAST_STREAMS_S)
        await view.settle()
        await view.close()


async def _undisturbed(client: AsyncClient, options: Options) -> dict[Case, Answer]:
    """The requests of this run with their answers."""
    rng = Random(f"{options.seed}/cases")
    expected = await ask_all(client, await draw_cases(rng, client, options.num_cases), options.num_clients)
    stopped = [
        with_stop(case, answer.text, rng) for case, answer in list(expected.items())[::3] if len(answer.text) > 6
    ]
    return expected | await ask_all(client, stopped, options.num_clients)
