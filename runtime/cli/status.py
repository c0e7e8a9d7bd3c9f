"""``shardray status``: what the fleet is made of and what it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from rich.console import Group

    from shardray.v1 import control_pb2


def command(
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show every change until Ctrl-C.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Wait this long for an answer.")] = 10.0,
) -> None:
    """Show the replicas and their shards.

    Which process holds which layers and heads, KV use, queue, tokens per second.
    """
    from shardray.runtime.client import Client

    with Client(server, timeout_s=timeout_s) as client:
        if watch:
            _watch(client.watch_fleet, as_json)
        elif as_json:
            _print_json(client.fleet())
        else:
            from shardray.runtime.cli.shard_table import table_console

            table_console().print(describe(client.fleet()))


def _watch(watch_fleet: Callable[[], Iterator[control_pb2.Fleet]], as_json: bool) -> None:
    from rich.live import Live

    from shardray.runtime.cli.shard_table import table_console

    if as_json:
        for fleet in watch_fleet():
            _print_json(fleet)
        return
    with Live(console=table_console(), auto_refresh=False) as screen:
        for fleet in watch_fleet():
            screen.update(describe(fleet), refresh=True)


def _print_json(fleet: control_pb2.Fleet) -> None:
    from shardray.runtime.cli.json_messages import to_jsonable

    print(json.dumps(to_jsonable(fleet)), flush=True)


def describe(fleet: control_pb2.Fleet) -> Group:
    """The fleet in a line, its replicas, and the table of shards."""
    from rich.console import Group
    from rich.text import Text

    from shardray.runtime.cli.shard_table import shard_table

    state = _word(fleet)
    head = (
        f"{fleet.model_id}: {state}, {fleet.num_live_requests} requests in flight, {fleet.num_queued_requests} queued"
    )
    lines = [Text(head + (f" – {fleet.reason}" if fleet.reason else ""), style="bold")]
    lines += [Text(_replica_line(replica)) for replica in fleet.replicas]
    table = shard_table((replica.replica_id, replica.shards) for replica in fleet.replicas)
    return Group(*lines, table) if table.row_count else Group(*lines)


def _replica_line(replica: control_pb2.Replica) -> str:
    from shardray.runtime.cluster.messages import stats_from_proto

    line = f"replica {replica.replica_id}: {_word(replica)}"
    if replica.reason:
        done = f" {replica.progress:.0%}" if _word(replica) == "loading" else ""
        line += f" – {replica.reason}{done}"
    if replica.stats.num_pages:
        stats = stats_from_proto(replica.stats)
        line += (
            f", {replica.output_tokens_per_s:.0f} tokens/s, {stats.num_running} running, {stats.num_waiting} waiting, "
            f"KV {stats.num_used_pages / stats.num_pages:.0%} of {stats.num_pages * stats.block_size:,} tokens "
            f"({stats.num_full_sequences:.1f} full-length sequences), {stats.kv_waste:.1%} of it wasted, "
            f"step {1000 * stats.step_time_s:.1f} ms"
        )
    return line


def _word(message: control_pb2.Fleet | control_pb2.Replica) -> str:
    from shardray.runtime.cli.json_messages import enum_word
    from shardray.v1 import control_pb2

    return enum_word(control_pb2.FleetState.DESCRIPTOR, message.state)
