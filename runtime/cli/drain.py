"""``shardray drain``: the end of a server, with nobody cut off."""

from __future__ import annotations

from typing import Annotated

import typer

from shardray.runtime.cli import options


def command(
    timeout_s: Annotated[
        float, typer.Option("--timeout", "--timeout-s", help="Seconds that requests in flight get to end.")
    ] = 60.0,
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Take no new requests, let those in flight end, then stop the server."""
    from shardray.runtime.cli.operation import follow
    from shardray.runtime.client import Client

    with Client(server) as client:
        follow(client.drain(timeout_s), as_json)
