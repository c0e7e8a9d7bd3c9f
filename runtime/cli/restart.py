"""``shardray restart``: new processes for all hosts, while clients stream."""

from __future__ import annotations

from shardray.runtime.cli import options


def command(server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False) -> None:
    """Replace every host by a new process, replica by replica.

    Streams go on. Ends when every replica runs on new hosts.
    """
    from shardray.runtime.cli.operation import follow
    from shardray.runtime.client import Client

    with Client(server) as client:
        follow(client.restart(), as_json)
