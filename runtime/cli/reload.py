"""``shardray reload``: other weights, while clients stream."""

from __future__ import annotations

from typing import Annotated

import typer

from shardray.runtime.cli import options


def command(
    source: Annotated[
        str, typer.Argument(help="What model.source takes: a known name, a hub id, or a folder that the server sees.")
    ],
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Serve other weights, replica by replica.

    Streams go on. Ends when every replica serves the new weights.
    """
    from shardray.runtime.cli.operation import follow
    from shardray.runtime.client import Client

    with Client(server) as client:
        follow(client.reload(source), as_json)
