"""What ``shardray serve`` prints while a fleet comes up: bars and a table for people, JSON lines for scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from shardray.runtime.cli.progress import load_bars
from shardray.runtime.cli.shard_table import shard_table, table_console
from shardray.runtime.cluster.events import ClusterEvent, PlacementWaiting, ReplicaLost, ReplicaRecovered, ShardProgress
from shardray.runtime.config import Config
from shardray.runtime.driver.fleet import FleetStatus
from shardray.runtime.serve import Watcher


@contextlib.contextmanager
def text_watcher(settings: Config) -> Iterator[Watcher]:
    """Bars on stderr until the fleet is ready, then the address and the table of shards on stdout."""
    with contextlib.ExitStack() as loading:
        report = loading.enter_context(load_bars())

        def on_loading(event: ClusterEvent) -> None:
            if isinstance(event, PlacementWaiting):
                report(f"replica {event.replica_id}", f"{event.reason} (waiting {event.remaining_s:.0f} s more)", 0.0)
            elif isinstance(event, ShardProgress):
                report(f"replica {event.replica_id} rank {event.rank} pid {event.pid}", event.doing, event.fraction)

        def on_ready(address: str, fleet: FleetStatus) -> None:
            loading.close()
            show_fleet(settings, address, fleet)

        def on_metrics(address: str) -> None:
            table_console().print(f"Metrics and a page of the fleet: [bold]http://{address}/[/]")

        def on_gateway(address: str) -> None:
            table_console().print(f"Gateways (vllm.grpc.engine): [bold]grpc://{address}[/]")

        yield Watcher(lambda address: None, on_loading, on_ready, on_metrics, on_gateway)


@contextlib.contextmanager
def json_watcher(settings: Config) -> Iterator[Watcher]:
    """One JSON object a line on stdout: listening, loading, serving; lost and recovered whenever that happens."""

    def emit(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    def on_loading(event: ClusterEvent) -> None:
        if isinstance(event, PlacementWaiting | ShardProgress):
            emit("loading", **dataclasses.asdict(event))
        elif isinstance(event, ReplicaLost):
            emit("lost", replica_id=event.replica_id, reason=event.reason)
        elif isinstance(event, ReplicaRecovered):
            emit("recovered", replica_id=event.replica_id, **dataclasses.asdict(event.times))

    def on_ready(address: str, fleet: FleetStatus) -> None:
        shards = [
            {"replica_id": replica.replica_id, **msgspec.structs.asdict(shard)}
            for replica in fleet.replicas
            for shard in replica.shards
        ]
        emit("serving", address=address, model=settings.model.source, shards=shards)

    yield Watcher(
        on_listening=lambda address: emit("listening", address=address),
        on_loading=on_loading,
        on_ready=on_ready,
        on_metrics=lambda address: emit("metrics", address=address),
        on_gateway=lambda address: emit("gateway", address=address),
    )


def show_fleet(settings: Config, address: str, fleet: FleetStatus) -> None:
    """The SERVING line and the table of shards."""
    parallel = settings.parallel
    shape = f"tensor {parallel.tensor_parallel_size} × pipeline {parallel.pipeline_parallel_size}"
    console = table_console()
    console.print(
        f"[bold green]SERVING[/] {settings.model.source} on [bold]{address}[/], {shape} × {parallel.replicas}"
    )
    console.print(shard_table((replica.replica_id, replica.shards) for replica in fleet.replicas))
