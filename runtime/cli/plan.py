"""``shardray plan``: what a serving file would take and give, from a model's headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from shardray.runtime.cli import options

T = TypeVar("T")


def command(
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Hosts to find the best shape for; left out: the shape of the file.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each host, e.g. 24GiB; left out: what is in this machine.")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="A host reads its memory at, e.g. 3.35TB/s.")] = None,
    compute: Annotated[str | None, typer.Option(help="A host multiplies matrices at, e.g. 989TFLOP/s.")] = None,
    link: Annotated[
        str | None, typer.Option(help="A host sends to another at; left out: 50GB/s, or as measured.")
    ] = None,
    message_us: Annotated[
        float | None, typer.Option(min=0, help="Microseconds that any message takes besides; left out: 5, or measured.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine's kernels (CPUs, some seconds) for all of these.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together, in all replicas.")] = 32,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of each; left out: 1024 or the window.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt; left out: as --context.")] = None,
    as_json: options.Json = False,
) -> None:
    """Tell what a serving file takes and gives, before anything is fetched or started.

    Memory of each host, tokens of KV, work and traffic of a token, the rates that bandwidth and compute allow (with
    --measure those that this machine should reach), the best shape for a number of hosts, and what stands in the way
    when nothing fits. Exits with 1 if the model does not fit.
    """
    from shardray.runtime.cli.plan_tables import describe
    from shardray.runtime.cli.shard_table import table_console
    from shardray.runtime.config import load_config
    from shardray.runtime.config.units import parse_bandwidth, parse_bytes, parse_flops
    from shardray.runtime.engine.plan_report import Wishes, make_report, to_jsonable

    if (bandwidth is None) != (compute is None):
        raise typer.BadParameter(
            "rates follow from both together; give the other one too", param_hint="--bandwidth and --compute"
        )
    if measure and bandwidth is not None:
        raise typer.BadParameter("measured or given; leave one of them out", param_hint="--measure and --bandwidth")
    wishes = Wishes(
        num_hosts=gpus,
        memory_bytes=_parsed(memory, "--memory", parse_bytes),
        bytes_per_s=_parsed(bandwidth, "--bandwidth", parse_bandwidth),
        flops_per_s=_parsed(compute, "--compute", parse_flops),
        link_bytes_per_s=_parsed(link, "--link", parse_bandwidth),
        message_s=None if message_us is None else message_us * 1e-6,
        num_seqs=batch,
        context_len=context,
        prompt_len=prompt,
        measures=measure,
    )
    report = make_report(load_config(config, overrides or ()), wishes)
    if as_json:
        typer.echo(json.dumps(to_jsonable(report)))
    else:
        table_console().print(describe(report))
    if not report.chosen.mesh.fits:
        raise typer.Exit(1)


def _parsed(text: str | None, option: str, parse: Callable[[str], T]) -> T | None:
    """Raises typer.BadParameter with what would be accepted."""
    if text is None:
        return None
    try:
        value = parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if not value:
        raise typer.BadParameter(f"{text!r} is nothing at all", param_hint=option)
    return value
