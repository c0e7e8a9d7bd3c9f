"""``python -m benchmarks``: see benchmarks/README.md."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks import driver_load, fleet, forecast, front_door, gpu, recovery, scaling, startup
from benchmarks.compare import read_records, to_markdown
from benchmarks.emitting import RESULTS_DIR, Emit, emitter, new_run_id
from benchmarks.everything import PARTS, run_parts
from benchmarks.gpu_parts import TINY, GpuSetup
from benchmarks.kinds import KINDS
from benchmarks.paper import SCALING_PAGE, tables, with_tables
from benchmarks.peers import PeerError, make_environments
from benchmarks.report import PERFORMANCE_DIR, PERFORMANCE_PAGE, write_report
from benchmarks.side_by_side import RunSetup, chosen_suite, run_suite
from benchmarks.suites import SUITES, Suite
from benchmarks.workloads import MAIN, WORKLOADS
from shardray.runtime.server.loop import run as run_in_loop

T = TypeVar("T")
Output = Annotated[Path | None, typer.Option(help="Appended to. Default: a new file in benchmarks/results.")]
Model = Annotated[str, typer.Option(help="What shardray pull takes.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32; side by side also int8, of weights.")]
HostThreads = Annotated[int, typer.Option(help="Compute threads of each host.")]

app = typer.Typer(
    help="Measures shardray, and other runtimes beside it. Without a command: run.",
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
        list[str] | None, typer.Option("--workload", "-w", help=f"Of {', '.join(WORKLOADS)}; repeat.")
    ] = None,
    suite: Annotated[str, typer.Option(help=f"Without -c and -w: {', '.join(SUITES)}.")] = "targets",
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads, and cores, of each contestant.")] = 2,
    rounds: Annotated[int | None, typer.Option(help="Times that every contestant gets its turn.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    scale: Annotated[float, typer.Option(help="Below 1: shorter and fewer requests, to try things out.")] = 1.0,
    quiet_timeout_s: Annotated[float, typer.Option(help="Longest wait for a quiet machine before a run.")] = 120.0,
    run_timeout_s: Annotated[float, typer.Option(help="Longest time for one run.")] = 1800.0,
    judge: Annotated[bool, typer.Option(help="Hold the tokens against a reference in float32.")] = True,
    output: Output = None,
) -> None:
    """Print one JSON line a run (on stdout, and into a file), then the tables and targets on stderr."""
    chosen = _or_exit(_chosen, contestants or (), workloads or (), suite)
    started = new_run_id()
    setup = RunSetup(model, dtype, threads, rounds, seed, scale, quiet_timeout_s, run_timeout_s, judge, started)
    target = output or RESULTS_DIR / f"{started}.jsonl"
    emit = emitter(target, {"run_id": started, "seed": seed, "scale": scale})
    succeeded = _or_exit(run_suite, chosen, setup, emit)
    print(f"\n{to_markdown(read_records([target]))}\n{target}", file=sys.stderr)
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def compare(
    files: Annotated[list[Path] | None, typer.Argument(help="Result files; default: the newest.")] = None,
    allow_busy: Annotated[bool, typer.Option(help="Count runs that had to share the machine.")] = False,
) -> None:
    """Print the figures and targets of earlier runs as Markdown."""
    chosen = files or sorted(RESULTS_DIR.glob("*.jsonl"))[-1:]
    if not chosen:
        raise typer.BadParameter(f"no results in {RESULTS_DIR} yet; give a file, or run first")
    print(to_markdown(read_records(chosen), allow_busy), end="")


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Default: all of docs/performance.")] = None,
    target: Annotated[
        Path, typer.Option(help="The Markdown file; plots go into a folder of its name.")
    ] = PERFORMANCE_PAGE,
) -> None:
    """Write docs/performance.md and its plots (extra [plot]) from JSON lines."""
    chosen = files or sorted(PERFORMANCE_DIR.glob("*.jsonl"))
    if not chosen:
        raise typer.BadParameter(f"no *.jsonl in {PERFORMANCE_DIR}; run something with --output into it first")
    write_report(read_records(chosen), target)
    print(target)


@app.command(name="all")
def _all(
    parts: Annotated[list[str] | None, typer.Option("--part", help=f"Of {', '.join(PARTS)}; repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: today's file in docs/performance.")] = None,
) -> None:
    """Measure everything of docs/performance.md one after the other, then write the page."""
    target = output or PERFORMANCE_DIR / f"{new_run_id()[:8]}.jsonl"
    succeeded = _or_exit(run_parts, parts or (), target.resolve())
    report(None if output is None else [target])
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def paper(
    write: Annotated[bool, typer.Option(help="Put the tables into docs/scaling.md.")] = False,
) -> None:
    """Print what meshes of 8 and 64 GPUs cost and can reach, by the functions behind shardray plan."""
    if write:
        SCALING_PAGE.write_text(with_tables(SCALING_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, content in tables().items():
        print(f"{name}\n\n{content}\n")


@app.command()
def peers(names: Annotated[list[str] | None, typer.Argument(help="Default: all of them.")] = None) -> None:
    """Make the environments of the peers: each has one of its own."""
    _or_exit(make_environments, names or ())


@app.command(name="recovery")
def _recovery(
    spares: Annotated[int, typer.Option(help="Warm spares.")] = 1,
    rounds: Annotated[int, typer.Option(help="Hosts that are killed.")] = 6,
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    threads: HostThreads = 1,
    peace: Annotated[float, typer.Option(help="Seconds without a fault before each kill.")] = 6.0,
    output: Output = None,
) -> None:
    """Kill hosts under a stream; print one JSON line a kill, then the table of where the time went on stderr."""
    setup = recovery.RecoverySetup(model, dtype, spares, rounds, threads, peace)
    emit = _own_emitter(output, "recovery", vars(setup))
    found = asyncio.run(_collect(recovery.measure(setup), lambda one: emit(dataclasses.asdict(one))))
    print(f"\n{recovery.to_table(found, spares)}", file=sys.stderr)


@app.command(name="scaling")
def _scaling(
    shapes: Annotated[str, typer.Option(help="Tensor x pipeline, one after the other.")] = "1x1,2x1,1x2,1x1",
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    threads: HostThreads = 1,
    output: Output = None,
) -> None:
    """Change the counts under a stream; print one JSON line a change, then the table of its pauses on stderr."""
    setup = scaling.ScalingSetup(model, dtype, tuple(_or_exit(_shape, word) for word in shapes.split(",")), threads)
    emit = _own_emitter(output, "scaling", {"model": model})
    found = asyncio.run(_collect(scaling.measure(setup), lambda one: emit(dataclasses.asdict(one))))
    print(f"\n{scaling.to_table(found)}", file=sys.stderr)


@app.command(name="fleet")
def _fleet(
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    threads: HostThreads = 1,
    rounds: Annotated[int, typer.Option(help="Starts of each kind.")] = 3,
    idle: Annotated[float, typer.Option(help="Seconds for which an idle fleet is watched.")] = 30.0,
    output: Output = None,
) -> None:
    """Time from serve to the first token (Ray started with it, and running), idle processors, memory of hosts."""
    setup = fleet.FleetSetup(model, dtype, threads, rounds, idle)
    emit = _own_emitter(output, "fleet", {"model": model})
    asyncio.run(_collect(fleet.measure_starts(setup), emit))
    rest = asyncio.run(fleet.measure_rest(setup))
    emit(rest)
    print(f"\n{fleet.to_table([rest])}", file=sys.stderr)


@app.command()
def driver(
    window: Annotated[float, typer.Option(help="Seconds for which each point is watched.")] = 6.0,
    output: Output = None,
) -> None:
    """What the driver costs for each token, against streams and replicas (that have no model)."""
    found = asyncio.run(_collect(driver_load.measure(window), _own_emitter(output, "driver", {})))
    print(f"\n{driver_load.to_table(found)}", file=sys.stderr)


@app.command()
def starts(
    sizes: Annotated[str, typer.Option(help="Of random models, the smallest first.")] = ",".join(startup.SIZES),
    rounds: Annotated[int, typer.Option(help="Starts of each.")] = 2,
    threads: HostThreads = 2,
    quiet_timeout_s: Annotated[float, typer.Option(help="Longest wait for a quiet machine before a start.")] = 60.0,
    output: Output = None,
) -> None:
    """Start-up against the size of the model."""
    names = tuple(sizes.split(","))
    if unknown := sorted(set(names) - set(startup.SIZES)):
        raise typer.BadParameter(f"unknown size {unknown[0]!r}; known: {', '.join(startup.SIZES)}")
    started = new_run_id()
    setup = startup.StartupSetup(names, rounds, threads, quiet_timeout_s, RESULTS_DIR / "logs" / started)
    emit, found = _own_emitter(output, "starts", {}), []
    for record in startup.measure(setup):
        emit(record)
        found.append(record)
    print(f"\n{startup.to_table(found)}", file=sys.stderr)


def _chosen(labels: Sequence[str], workloads: Sequence[str], suite: str) -> Suite:
    if suite not in SUITES:
        raise ValueError(f"--suite: unknown {suite!r}; known: {', '.join(SUITES)}")
    if not labels and not workloads:
        return SUITES[suite]
    everyone = [label for those, _ in SUITES["targets"].tasks for label in those]
    return chosen_suite(labels or everyone, workloads or MAIN)


async def _collect(source: AsyncIterator[T], tell: Callable[[Any], None]) -> list[T]:
    found = []
    async for one in source:
        tell(one)
        found.append(one)
    return found


@app.command(name="front-door")
def _front_door(
    model: Annotated[str, typer.Option(help="Whose tokenizer makes text of the tokens.")] = "smollm2-135m",
    seconds: Annotated[float, typer.Option(help="How long each figure is measured.")] = 10.0,
    output: Output = None,
) -> None:
    """Load a server with a stub engine; print one JSON line a figure, then the table with the targets on stderr."""
    emit = _own_emitter(output, "front-door", {})
    figures = front_door.measure(front_door.FrontDoorSetup(model, seconds))
    found = _or_exit(
        run_in_loop, _collect(figures, lambda one: emit({**dataclasses.asdict(one), "target": one.target}))
    )
    print(f"\n{front_door.to_table(found)}", file=sys.stderr)


@app.command(name="gpu")
def _gpu(
    parts: Annotated[list[str] | None, typer.Option("--part", help=f"Of {', '.join(gpu.LIMITS_S)}; repeat.")] = None,
    device: Annotated[str, typer.Option(help="cuda:0, say.")] = "cuda:0",
    tiny: Annotated[bool, typer.Option(help="Tiny shapes on a CPU, to try the script out.")] = False,
    output: Output = None,
) -> None:
    """What one GPU reaches at decode, prefill and loading, against what it can do; at most ten minutes."""
    setup = TINY if tiny else GpuSetup(device=device)
    emit = _own_emitter(output, "gpu", {})
    found = _or_exit(lambda: list(_told(gpu.measure(setup, parts or ()), emit)))
    print(f"\n{gpu.to_table(found)}", file=sys.stderr)


@app.command(name="forecast")
def _forecast(
    cuts: Annotated[
        str, typer.Option(help="Tensor x pipeline x threads of a rank, one after the other.")
    ] = "1x1x2,1x1x1,2x1x1,1x2x1",
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    output: Output = None,
) -> None:
    """Hold what shardray plan --measure forecasts of steps against the steps; one JSON line a step."""
    emit = _own_emitter(output, "forecast", {"model": model, "dtype": dtype})
    found = []
    for cut in [_or_exit(_cut, word) for word in cuts.split(",")]:
        for one in forecast.measure(forecast.ForecastSetup(model, dtype, *cut)):
            emit(dataclasses.asdict(one) | {"ratio": one.ratio})
            found.append(one)
    print(f"\n{forecast.to_table(found)}", file=sys.stderr)


def _told(records: Iterator[T], emit: Callable[[T], None]) -> Iterator[T]:
    for record in records:
        emit(record)
        yield record


def _own_emitter(output: Path | None, name: str, common: dict[str, Any]) -> Emit:
    started = new_run_id()
    return emitter(output or RESULTS_DIR / f"{started}-{name}.jsonl", {"run_id": started, **common})


def _shape(word: str) -> tuple[int, int]:
    tp_size, _, pp_size = word.strip().partition("x")
    if not (tp_size.isdigit() and pp_size.isdigit() and int(tp_size) and int(pp_size)):
        raise ValueError(f"--shapes: {word!r} is no shape; write tensor x pipeline, like 2x1")
    return int(tp_size), int(pp_size)


def _cut(word: str) -> tuple[int, int, int]:
    shape, _, num_threads = word.strip().rpartition("x")
    if not (num_threads.isdigit() and int(num_threads)):
        raise ValueError(f"--cuts: {word!r} is no cut; write tensor x pipeline x threads, like 2x1x1")
    return *_shape(shape), int(num_threads)


def _or_exit(work: Any, *arguments: Any) -> Any:
    """What a person can mend is one line."""
    try:
        return work(*arguments)
    except (ValueError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
