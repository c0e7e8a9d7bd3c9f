"""``python -m benchmarks``: run contestants side by side (the default), compare results, install peers, recover."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks.compare import read_records, to_markdown
from benchmarks.harness import Harness, Options
from benchmarks.kinds import DEFAULT_LABELS, KINDS, parse_label
from benchmarks.machine import measure_machine
from benchmarks.peers import PeerError, make_environments
from benchmarks.recovery import Recovery, RecoverySetup, measure, to_table
from benchmarks.scaling import ScalePause, ScalingSetup
from benchmarks.scaling import measure as measure_scaling
from benchmarks.scaling import to_table as scaling_table
from benchmarks.workloads import WORKLOADS, make_workload
from shardray.runtime.model.sources import resolve_model

Record = TypeVar("Record", Recovery, ScalePause)

RESULTS_DIR = Path(__file__).parent / "results"

app = typer.Typer(
    help="Measures shardray side by side with other runtimes. Without a command: run.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        run()


@app.command()
def run(
    contestants: Annotated[
        list[str] | None,
        typer.Option("--contestant", "-c", help=f"KIND[:KEY=VALUE,...] of {', '.join(KINDS)}."),
    ] = None,
    workloads: Annotated[
        list[str] | None, typer.Option("--workload", "-w", help=f"One of {', '.join(WORKLOADS)}; repeat.")
    ] = None,
    model: Annotated[str, typer.Option(help="What shardray pull takes.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads, and cores, of each contestant.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that every contestant gets its turn.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    scale: Annotated[float, typer.Option(help="Below 1: shorter and fewer requests, to try things out.")] = 1.0,
    quiet_timeout_s: Annotated[float, typer.Option(help="Longest wait for a quiet machine before a run.")] = 120.0,
    run_timeout_s: Annotated[float, typer.Option(help="Longest time for one run.")] = 1800.0,
    output: Annotated[Path | None, typer.Option(help="Default: a new file in benchmarks/results.")] = None,
) -> None:
    """Print one JSON line a run (on stdout, and into a file), then the comparison on stderr."""
    started = time.strftime("%Y%m%d-%H%M%S")
    chosen = [_or_exit(parse_label, label) for label in contestants or DEFAULT_LABELS]
    if unknown := sorted(set(workloads or ()) - set(WORKLOADS)):
        raise typer.BadParameter(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    if threads > len(os.sched_getaffinity(0)):
        raise typer.BadParameter(f"--threads {threads}: this process may use {len(os.sched_getaffinity(0))} cores")
    _use_cores(threads)
    model_dir = _or_exit(resolve_model, model)
    vocab_size = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    options = Options(
        model_dir=model_dir,
        dtype=dtype,
        num_threads=threads,
        num_rounds=rounds,
        quiet_timeout_s=quiet_timeout_s,
        run_timeout_s=run_timeout_s,
        log_dir=RESULTS_DIR / "logs" / started,
    )
    target = output or RESULTS_DIR / f"{started}.jsonl"
    emit = _emitter(target, {"run_id": started, "seed": seed, "scale": scale})
    work = [make_workload(name, vocab_size, seed, scale) for name in workloads or WORKLOADS]
    succeeded = Harness(options, measure_machine(threads), work, emit).run(chosen)
    print(f"\n{to_markdown(read_records([target]))}\n{target}", file=sys.stderr)
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def compare(
    files: Annotated[list[Path] | None, typer.Argument(help="Result files; default: the newest.")] = None,
    allow_busy: Annotated[bool, typer.Option(help="Count runs that had to share the machine.")] = False,
) -> None:
    """Print the figures and ratios of earlier runs as Markdown."""
    chosen = files or sorted(RESULTS_DIR.glob("*.jsonl"))[-1:]
    if not chosen:
        raise typer.BadParameter(f"no results in {RESULTS_DIR} yet; give a file, or run first")
    print(to_markdown(read_records(chosen), allow_busy), end="")


@app.command()
def peers() -> None:
    """Make the environments of the peers that need one of their own."""
    _or_exit(make_environments)


@app.command()
def recovery(
    spares: Annotated[int, typer.Option(help="Warm spares.")] = 1,
    rounds: Annotated[int, typer.Option(help="Hosts that are killed.")] = 6,
    model: Annotated[str, typer.Option(help="What shardray pull takes.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads of each host.")] = 1,
    peace: Annotated[float, typer.Option(help="Seconds without a fault before each kill.")] = 6.0,
    output: Annotated[Path | None, typer.Option(help="Default: a new file in benchmarks/results.")] = None,
) -> None:
    """Kill hosts under a stream; print one JSON line a kill, then the table of where the time went on stderr."""
    started = time.strftime("%Y%m%d-%H%M%S")
    setup = RecoverySetup(model, dtype, spares, rounds, threads, peace)
    emit = _emitter(output or RESULTS_DIR / f"{started}-recovery.jsonl", {"run_id": started, **vars(setup)})
    print(f"\n{to_table(asyncio.run(_emit_all(measure(setup), emit)), spares)}", file=sys.stderr)


@app.command()
def scaling(
    shapes: Annotated[str, typer.Option(help="Tensor x pipeline, one after the other.")] = "1x1,2x1,1x2,1x1",
    model: Annotated[str, typer.Option(help="What shardray pull takes.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads of each host.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Default: a new file in benchmarks/results.")] = None,
) -> None:
    """Change the counts under a stream; print one JSON line a change, then the table of its pauses on stderr."""
    started = time.strftime("%Y%m%d-%H%M%S")
    setup = ScalingSetup(model, dtype, tuple(_or_exit(_shape, word) for word in shapes.split(",")), threads)
    emit = _emitter(output or RESULTS_DIR / f"{started}-scaling.jsonl", {"run_id": started, "model": model})
    print(f"\n{scaling_table(asyncio.run(_emit_all(measure_scaling(setup), emit)))}", file=sys.stderr)


async def _emit_all(records: AsyncIterator[Record], emit: Any) -> list[Record]:
    found = []
    async for record in records:
        emit(dataclasses.asdict(record))
        found.append(record)
    return found


def _shape(word: str) -> tuple[int, int]:
    tp_size, _, pp_size = word.strip().partition("x")
    if not (tp_size.isdigit() and pp_size.isdigit() and int(tp_size) and int(pp_size)):
        raise ValueError(f"--shapes: {word!r} is no shape; write tensor x pipeline, like 2x1")
    return int(tp_size), int(pp_size)


def _or_exit(work: Any, *arguments: Any) -> Any:
    """What a person can mend is one line."""
    try:
        return work(*arguments)
    except (ValueError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _use_cores(num_cores: int) -> None:
    """Bind this process, and so all that it starts, to that many cores: every contestant gets the same ones."""
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[:num_cores])


def _emitter(target: Path, common: dict[str, Any]) -> Any:
    target.parent.mkdir(parents=True, exist_ok=True)

    def emit(record: dict[str, Any]) -> None:
        line = json.dumps(common | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | record)
        print(line, flush=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return emit


if __name__ == "__main__":
    app()
