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
    """A live picture on a terminal; in a pipe, one description after the other."""
    from rich.live import Live

    from shardray.runtime.cli.fleet_view import FleetView
    from shardray.runtime.cli.shard_table import table_console

    console, view = table_console(), FleetView()
    if as_json or not console.is_terminal:
        for fleet in watch_fleet():
            _print_json(fleet) if as_json else console.print(describe(fleet))
        return
    with Live(console=console, auto_refresh=False) as screen:
        for fleet in watch_fleet():
            screen.update(view.draw(fleet), refresh=True)


def _print_json(fleet: control_pb2.Fleet) -> None:
    from shardray.runtime.cli.json_messages import to_jsonable

    print(json.dumps(to_jsonable(fleet)), flush=True)


def describe(fleet: control_pb2.Fleet) -> Group:
    """The fleet in a line, its replicas, and the table of shards."""
    from rich.console import Group
    from rich.text import Text

    from shardray.runtime.cli.fleet_words import operation_line, recovery_line, state_word
    from shardray.runtime.cli.shard_table import shard_table

    state = state_word(fleet)
    head = (
        f"{fleet.model_id}: {state}, {fleet.num_live_requests} requests in flight, {fleet.num_queued_requests} queued"
    )
    if fleet.num_ready_spares or fleet.num_wanted_spares:
        head += f", {fleet.num_ready_spares} of {fleet.num_wanted_spares} spares ready"
    lines = [Text(head + (f" – {fleet.reason}" if fleet.reason else ""), style="bold")]
    if fleet.HasField("operation"):
        lines.append(Text(operation_line(fleet.operation)))
    for replica in fleet.replicas:
        lines.append(Text(_replica_line(replica)))
        if line := recovery_line(replica):
            lines.append(Text(f"  {line}"))
    table = shard_table((replica.replica_id, replica.shards) for replica in fleet.replicas)
    return Group(*lines, table) if table.row_count else Group(*lines)


def _replica_line(replica: control_pb2.Replica) -> str:
    from shardray.runtime.cli.fleet_words import state_word
    from shardray.runtime.server.messages import stats_from_proto

    line = f"replica {replica.replica_id}: {state_word(replica)}"
    if replica.reason:
        done = f" {replica.progress:.0%}" if state_word(replica) in ("loading", "recovering") else ""
        line += f" – {replica.reason}{done}"
    if replica.stats.num_pages:
        stats = stats_from_proto(replica.stats)
        line += (
            f", {replica.output_tokens_per_s:.0f} tokens/s, {stats.num_running} running, {stats.num_waiting} waiting, "
            f"KV {stats.num_used_pages / stats.num_pages:.0%} of {stats.num_pages * stats.block_size:,} tokens "
            f"({stats.num_full_sequences:.1f} full-length sequences), {stats.kv_waste:.1%} of it wasted, "
            f"step {1000 * stats.step_time_s:.1f} ms"
        )
        if stats.num_prefix_hits:
            line += f", {stats.prefix_hit_rate:.0%} of prompts found computed"
        if stats.num_drafted_tokens:
            line += f", {stats.acceptance_rate:.0%} of drafted tokens right"
        if stats.expert_imbalance:
            line += f", busiest expert {stats.expert_imbalance:.1f}x the mean"
    return line
