"""``shardray trace``: what every rank does for some seconds, as a timeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shardray.runtime.cli import options


def command(
    seconds: Annotated[float, typer.Option(help="How long to look, at most 60.")] = 5.0,
    out: Annotated[Path, typer.Option(help="File for chrome://tracing and ui.perfetto.dev.")] = Path("timeline.json"),
    png: Annotated[Path | None, typer.Option(help="And a picture of some steps in the middle.")] = None,
    server: options.Server = options.DEFAULT_SERVER,
) -> None:
    """Write down every rank's steps, collectives, hand-overs and bubbles.

    Nothing is written down before or after; in between, steps take a few per cent longer.
    """
    from shardray.runtime.cli.timeline import join_parts, summary, to_chrome
    from shardray.runtime.client import Client

    with Client(server) as client:
        ranks = join_parts(client.trace(seconds))
    out.write_text(json.dumps(to_chrome(ranks)), encoding="utf-8")
    for rank in ranks:
        typer.echo(summary(rank))
    typer.echo(f"{out}: open it in chrome://tracing or https://ui.perfetto.dev")
    if png is not None:
        from shardray.runtime.cli.timeline_png import draw

        draw(ranks, png)
        typer.echo(f"{png}: a picture of it")
